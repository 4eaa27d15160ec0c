"""A frame as bytes gives the patches that the host cuts, in one program a bucket."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import hybrid_config

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.config.model import infinitevl_4b
from infinitevl_jax.inputs.frame import frame_inputs
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.frames import frame_patches
from infinitevl_jax.processing.images import ImageOptions, process_image, resize_image

FULL_SIZE = infinitevl_4b()
CUT = jax.jit(frame_patches)


def picture(height, width):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels.reshape(-1)[: 3 * 256] = np.repeat(np.arange(256), 3)[: pixels.size]
    return Image.fromarray(pixels)


def built(config, options, image, base=5, time=9):
    return frame_inputs(
        config,
        resize_image(image, options),
        *options.normalisation,
        token=config.video_token_id,
        base=base,
        time=time,
    )


@pytest.mark.parametrize("size", [(448, 448), (300, 500), (28, 56), (161, 99)])
def test_patches_are_those_of_the_host(size):
    """Pixels <= 1e-6, everything else equal, at the published sizes."""
    image, options, config = picture(*size), ImageOptions(), FULL_SIZE
    found = built(config, options, image)
    patches, grid = process_image(image, options)
    tokens = len(patches) // 4
    wanted = build_inputs(
        config,
        np.full((1, tokens), config.video_token_id),
        pixel_values_videos=patches,
        video_grid_thw=np.array([grid]),
        start=[5],
    )
    for name in ("tokens", "token_index", "segment_ids", "vision_index"):
        np.testing.assert_array_equal(getattr(found.decoder, name), getattr(wanted.decoder, name))
    positions = np.array(wanted.decoder.positions)
    positions[0] = 9
    np.testing.assert_array_equal(found.decoder.positions, positions)
    cut = CUT(found.patches)
    for name in ("row_column", "patch_index", "window_ids", "slice_ids"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(wanted.patches, name))
    assert cut.pixels.dtype == np.float32
    np.testing.assert_allclose(cut.pixels, wanted.patches.pixels, rtol=0, atol=1e-6)
    assert cut.slice_reach >= wanted.patches.slice_reach


def test_every_byte_value_of_every_channel():
    levels = np.repeat(np.arange(256, dtype=np.uint8), 4 * 3).reshape(1024, 3)
    image = Image.fromarray(levels.reshape(32, 32, 3))
    options = ImageOptions(patch_size=2, min_pixels=1, rescale_factor=1 / 127.5, mean=(1, 0.5, 0.1))
    config = hybrid_config()
    found = np.asarray(CUT(built(config, options, image).patches).pixels)
    patches, grid = process_image(image, options)
    wanted = build_inputs(
        config,
        np.full((1, 64), config.video_token_id),
        pixel_values_videos=patches,
        video_grid_thw=np.array([grid]),
    )
    assert len(np.unique(patches)) >= 3 * 256
    np.testing.assert_allclose(found, wanted.patches.pixels, rtol=0, atol=1e-6)


def test_bytes_and_programs():
    """A quarter of the bytes of one temporal half; sizes of a bucket share a program."""
    config, options = FULL_SIZE, ImageOptions(min_pixels=784)
    frame = built(config, options, picture(448, 448)).patches
    assert frame.pixels.dtype == np.uint8 and frame.pixels.nbytes == 448 * 448 * 3
    program = jax.jit(lambda frame: frame_patches(frame).pixels.sum())
    for size in ((28, 28), (112, 112), (56, 140), (140, 28)):
        program(built(config, options, picture(*size)).patches)
    assert program._cache_size() == 1


def test_frames_that_do_not_fit():
    config, scale = hybrid_config(), np.ones(3, np.float32)
    place = {"token": 1, "base": 0, "time": 0}
    for wrong, pixels, culprit in (
        (config, np.zeros((6, 8, 3), np.uint8), "6 x 8 pixels"),
        (config, np.zeros((8, 8, 1), np.uint8), "3 channels, a frame has 1"),
        (dataclasses.replace(config, vision=None), np.zeros((8, 8, 3), np.uint8), "text model"),
    ):
        with pytest.raises(InfiniteVLError, match=culprit):
            frame_inputs(wrong, pixels, scale, scale, **place)
