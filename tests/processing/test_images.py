import base64
import io
import random

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_resize

from infinitevl_jax.processing.images import ImageOptions, load_image, patchify, process_image, smart_resize


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def relative_rms(ours, theirs):
    return np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((448, 448), {}, (448, 448)),
        ((42, 140), {}, (56, 140)),  # 1.5 rounds to 2
        ((70, 140), {}, (56, 140)),  # 2.5 rounds to 2: half to even
        ((98, 126), {}, (112, 112)),  # 3.5 -> 4, 4.5 -> 4
        ((20, 20), {}, (56, 56)),  # grows to 3,136 pixels
        ((3000, 4000), {}, (840, 1148)),  # shrinks below 1,003,520
        ((28, 5600), {"max_pixels": 3136}, (28, 784)),  # never below one token
        ((300, 300), {"min_pixels": 200_704}, (448, 448)),
    ],
)
def test_smart_resize_by_the_published_rule(size, limits, expected):
    assert smart_resize(*size, **limits) == expected


def test_smart_resize_equals_transformers():
    rng = random.Random(0)
    for _ in range(2000):
        height, width = rng.randint(1, 3000), rng.randint(1, 3000)
        if max(height, width) > 200 * min(height, width):
            continue
        low, factor = rng.choice([3136, 100_352]), rng.choice([8, 28])
        high = rng.choice([low, 602_112, 12_845_056])
        assert smart_resize(height, width, factor, low, high) == reference_resize(height, width, factor, low, high)


def test_patches_stand_in_the_published_order():
    options = ImageOptions(patch_size=2, merge_size=2, min_pixels=1)
    frames = noise(8, 12)[None].repeat(3, 0)
    frames[1], frames[2] = frames[1] // 2, 255 - frames[2]
    patches, grid = patchify(frames, options)
    assert grid == (2, 4, 6) and patches.dtype == np.float32
    row = 0
    for t in range(2):
        for merged_row in range(2):
            for merged_column in range(3):
                for i in range(2):
                    for j in range(2):
                        top, left = 4 * merged_row + 2 * i, 4 * merged_column + 2 * j
                        pair = frames[[min(2 * t, 2), min(2 * t + 1, 2)], top : top + 2, left : left + 2]  # the odd last frame twice
                        want = (pair / 255 - np.asarray(options.mean)) / np.asarray(options.std)  # [2, 2, 2, 3]
                        np.testing.assert_allclose(patches[row], want.transpose(3, 0, 1, 2).reshape(-1), atol=1e-5)
                        row += 1
    assert row == len(patches)


@pytest.mark.parametrize("size", [(448, 448), (61, 203), (17, 40), (900, 1400)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_pixels_equal_transformers(size, mode):
    picture = Image.fromarray(noise(*size, 4), "RGBA") if mode == "RGBA" else Image.fromarray(noise(*size)).convert(mode)
    limits = {"min_pixels": 50 * 784, "max_pixels": 600 * 784}
    ours, grid = process_image(load_image(picture), ImageOptions(**limits))
    theirs = Qwen2VLImageProcessorPil(**limits)(picture, return_tensors="np")
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    assert ours.dtype == np.float32
    assert relative_rms(ours, theirs["pixel_values"]) <= 1e-6


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    pixels = noise(30, 40)
    path = tmp_path / "a picture.png"
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (path, str(path), path.as_uri(), uri, data, bytearray(data), Image.open(path), pixels):
        picture = load_image(source)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_camera_orientation_is_applied():
    picture = Image.fromarray(noise(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(file.getvalue())), np.rot90(np.asarray(picture), -1))


def test_transparency_becomes_white():
    pixels = noise(4, 4, 4)
    pixels[..., 3] = 0
    assert (np.asarray(load_image(Image.fromarray(pixels, "RGBA"))) == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    picture = np.asarray(load_image(Image.fromarray(grey)))
    np.testing.assert_array_equal(picture[..., 0], grey // 257)


def test_asked_for_sides_are_rounded_and_limited():
    picture = load_image(noise(100, 100))
    assert process_image(picture, ImageOptions(), (280, 570))[1] == (1, 20, 40)
    assert process_image(picture, ImageOptions(max_pixels=78_400), (560, 560))[1] == (1, 20, 20)
