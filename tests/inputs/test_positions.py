"""Rotary positions, patch packing and the checks at the door, against the written rules."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from infinitevl_jax.config.model import ModelConfig, TextConfig, VisionConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.inputs.patches import bucket, pack_patches, window_order
from infinitevl_jax.inputs.positions import VisionItem, vision_positions
from infinitevl_jax.nn.rope import decoder_angles

IMAGE, VIDEO, START, END = 91, 92, 93, 94


@pytest.fixture
def config():
    text = TextConfig(
        layer_types=("sliding_attention", "linear_attention"),
        vocab_size=100,
        hidden_size=32,
        head_dim=16,
        mrope_section=(2, 3, 3),
    )
    vision = VisionConfig(
        depth=1,
        hidden_size=32,
        num_heads=2,
        patch_size=2,
        window_size=8,
        out_hidden_size=32,
        fullatt_block_indexes=(0,),
    )
    return ModelConfig(
        text,
        vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def batch_of(config, rows, images=(), videos=(), seconds=None, **extra):
    """Right-padded input_ids and random pixels for grids in patches."""
    width = max(map(len, rows))
    ids = np.array([row + [0] * (width - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask}
    for grids, pixels, grid_name in (
        (images, "pixel_values", "image_grid_thw"),
        (videos, "pixel_values_videos", "video_grid_thw"),
    ):
        if grids:
            batch[pixels] = np.random.default_rng(0).normal(
                size=(int(np.prod(grids, 1).sum()), config.vision.patch_features)
            )
            batch[grid_name] = np.array(grids)
    return batch | ({"second_per_grid_ts": seconds} if seconds else {}) | extra


def test_text_counts_up_and_follows_the_cache(config):
    assert (
        build_inputs(config, [[1, 2, 3]]).decoder.positions is None
    )  # left to the device: next_position + ordinal
    image = batch_of(config, [[IMAGE, 5]], images=[(1, 2, 2)])
    positions = build_inputs(config, **image, start=[40]).decoder.positions
    assert positions[:, 0].tolist() == [[40, 41]] * 3


def test_image_then_text(config):
    # grid 4 x 6 patches = 2 x 3 tokens; base 2, so rows 2..3, columns 2..4, next text at max + 1 =
    # 5
    batch = batch_of(config, [[7, START] + [IMAGE] * 6 + [END, 8]], images=[(1, 4, 6)])
    t, h, w = build_inputs(config, **batch).decoder.positions[:, 0]
    assert t.tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 5, 6]
    assert h.tolist() == [0, 1, 2, 2, 2, 3, 3, 3, 5, 6]
    assert w.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]


def test_video_time_counts_and_text_goes_on_after_the_largest_axis(config):
    # the case where transformers 5 differs: grid (3, 10, 8) merged (3, 5, 4), 2 s a step, 2
    # positions a second, base 3
    batch = batch_of(
        config, [[1, 2, START] + [VIDEO] * 60 + [END]], videos=[(3, 10, 8)], seconds=[2.0]
    )
    positions = build_inputs(config, **batch).decoder.positions[:, 0]
    assert sorted(set(positions[0, 3:63].tolist())) == [3, 7, 11]
    assert positions[:, 63].tolist() == [12, 12, 12]


def test_half_second_steps_are_not_truncated(config):
    batch = batch_of(config, [[VIDEO] * 3], videos=[(3, 2, 2)], seconds=[0.75])
    assert build_inputs(config, **batch).decoder.positions[0, 0].tolist() == [
        0,
        1,
        3,
    ]  # floor(i * 1.5)


@pytest.mark.parametrize("kind", [np.float64, np.float32, list])
@pytest.mark.parametrize(
    ("seconds", "rate", "want"),
    [
        (Fraction(1), 2, [0, 2, 4, 6]),
        (Fraction(2, 3), 3, [0, 2, 4, 6]),  # as floats 1.9999999 a step
        (Fraction(1, 3), 3, [0, 1, 2, 3]),
        (Fraction(1, 7), 7, [0, 1, 2, 3]),
        (Fraction(20, 30), 1.5, [0, 1, 2, 3]),
        (Fraction(49, 50), 2, [0, 1, 3, 5]),  # a true 0.98 s a step
    ],
)
def test_steps_of_time_are_exact(config, kind, seconds, rate, want):
    config = dataclasses.replace(
        config, vision=dataclasses.replace(config.vision, tokens_per_second=rate)
    )
    given = [float(seconds)] if kind is list else np.array([float(seconds)], kind)
    batch = batch_of(config, [[VIDEO] * 4], videos=[(4, 2, 2)]) | {"second_per_grid_ts": given}
    assert build_inputs(config, **batch).decoder.positions[0, 0].tolist() == want


def test_a_long_video_keeps_exact_time(config):
    item = VisionItem("video", (30_000, 1, 1), np.float64(1 / 3))
    np.testing.assert_array_equal(vision_positions(item, 0, 3)[0], np.arange(30_000))


@pytest.mark.parametrize("seconds", [np.nan, np.inf, -1.5, 1e30, 2.0**40, "a", None])
def test_seconds_that_are_none_are_refused(config, seconds):
    batch = batch_of(config, [[VIDEO] * 3], videos=[(3, 2, 2)], seconds=[seconds])
    with pytest.raises(InfiniteVLError, match="second_per_grid_ts"):
        build_inputs(config, **batch)


@pytest.mark.parametrize(
    "ids", [[[0.0, np.nan]], [[0.5, 1.5]], [[0, 2**40]], [[-1, 0]], [["a", "b"]]]
)
def test_position_ids_that_are_none_are_refused(config, ids):
    with pytest.raises(InfiniteVLError, match="position_ids"):
        build_inputs(config, [[1, 2]], position_ids=np.array(ids))


def test_position_ids_of_pads_do_not_matter(config):
    own = np.array([[-7, 3, 4]])
    positions = build_inputs(
        config, [[0, 1, 2]], attention_mask=[[0, 1, 1]], position_ids=own
    ).decoder.positions
    assert positions[:, 0, :2].tolist() == [[3, 4]] * 3


def test_seconds_are_truncated_when_asked_for(config):
    batch = batch_of(config, [[VIDEO] * 3], videos=[(3, 2, 2)], seconds=[0.75])
    assert build_inputs(config, **batch, truncate_seconds=True).decoder.positions[
        0, 0
    ].tolist() == [
        0,
        0,
        0,
    ]


def test_items_go_to_sequences_in_order(config):
    rows = [[IMAGE, 1, VIDEO], [2, 3], [IMAGE, IMAGE, VIDEO, VIDEO]]
    batch = batch_of(
        config,
        rows,
        images=[(1, 2, 2), (1, 2, 4)],
        videos=[(1, 2, 2), (2, 2, 2)],
        seconds=[1.0, 1.0],
    )
    one = build_inputs(config, **batch)
    assert sorted(one.decoder.vision_index[one.decoder.vision_index >= 0].tolist()) == list(
        range(6)
    )
    each = build_inputs(config, **batch, patches_by_row=True)
    assert each.patches.pixels.shape[0] == 3
    assert each.decoder.vision_index.tolist() == [[0, -1, 1, -1], [-1] * 4, [0, 1, 2, 3]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_rolled_to_the_end(config, side):
    ids = np.array([[1, 2, 3, 4], [5, 6, 0, 0] if side == "right" else [0, 0, 5, 6]])
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0] if side == "right" else [0, 0, 1, 1]])
    inputs = build_inputs(config, ids, mask, length=6)
    assert inputs.decoder.tokens[1].tolist() == [5, 6, 0, 0, 0, 0]
    assert inputs.decoder.token_index.tolist() == [[0, 1, 2, 3, -1, -1], [0, 1, -1, -1, -1, -1]]
    assert inputs.left_padding.tolist() == [0, 2 if side == "left" else 0]


def test_empty_arrays_are_no_images(config):
    nothing = dict(
        pixel_values=np.zeros((0, 24)), image_grid_thw=np.zeros((0, 3), int), second_per_grid_ts=[]
    )
    assert build_inputs(config, [[1, 2]], **nothing).patches is None


def test_large_positions_keep_their_angles():
    positions = np.array([0, 1, 2047, 2048, 4095, 100_000, 999_999, 1_048_577])
    angles = np.asarray(
        decoder_angles(np.broadcast_to(positions, (3, 1, len(positions))), 128, 1e6, (16, 24, 24)),
        np.float64,
    )[0]
    exact = positions[:, None] * 1e6 ** (-np.arange(64) / 64)
    error = np.abs(np.exp(1j * angles) - np.exp(1j * exact))
    assert error.max() < 3e-4  # a plain f32 product is off by 0.03


def test_windows_are_row_major_and_stay_inside_a_slice(config):
    order, window = window_order(
        (2, 6, 10), config.vision
    )  # 3 x 5 tokens a slice, windows of 2 x 2 tokens
    assert sorted(order.tolist()) == list(range(30))
    assert (np.diff(window) >= 0).all() and window.max() == 11
    assert order[:4].tolist() == [0, 1, 5, 6]  # the first window: rows 0-1, columns 0-1
    assert np.bincount(window).tolist() == [4, 4, 2, 2, 2, 1] * 2  # smaller at the edges
    assert set(order[window < 6]) == set(range(15))


def test_packing_pads_to_buckets_and_keeps_every_patch(config):
    grids = np.array([(1, 6, 10), (2, 4, 4)])
    pixels = np.arange(92 * 24, dtype=np.float32).reshape(92, 24)
    patches, place = pack_patches(pixels, grids, config.vision, [0, 0], 1)
    assert patches.pixels.shape == (1, 96, 24) and (patches.patch_index[0, 92:] == -1).all()
    assert patches.slice_reach == 64
    first = patches.pixels[0, place * 4]  # a merged token's four patches stay together, in order
    np.testing.assert_array_equal(first, pixels[::4])
    assert (patches.slice_ids[0, :92] == np.repeat([0, 1, 2], [60, 16, 16])).all()


def test_buckets_waste_at_most_a_third():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert sorted(set(sizes))[:6] == [64, 96, 128, 192, 256, 384]
    assert all(
        n <= s and (n > s * 2 / 3 - 1 or s == 64)
        for n, s in zip(range(1, 5000), sizes, strict=True)
    )


def test_vision_index_points_at_the_right_rows(config):
    batch = batch_of(config, [[IMAGE] * 15], images=[(1, 6, 10)])
    inputs = build_inputs(config, **batch)
    merged = inputs.patches.pixels[0].reshape(-1, 4, config.vision.patch_features)
    np.testing.assert_array_equal(
        merged[inputs.decoder.vision_index[0]].reshape(-1, config.vision.patch_features),
        batch["pixel_values"],
    )


BAD = {
    "float ids": (dict(input_ids=[[1.0]]), "dtype float"),
    "one-dimensional ids": (dict(input_ids=[1, 2]), r"shape \(2,\)"),
    "id beyond the vocabulary": (dict(input_ids=[[100]]), "input_ids holds 100"),
    "negative id": (dict(input_ids=[[-1]]), "input_ids holds -1"),
    "no tokens": (dict(input_ids=np.zeros((1, 0), int)), "at least one"),
    "mask of another shape": (
        dict(input_ids=[[1, 2]], attention_mask=[[1]]),
        "attention_mask has shape",
    ),
    "mask with a hole": (
        dict(input_ids=[[1, 2, 3]], attention_mask=[[1, 0, 1]]),
        "sequence 0 has a hole",
    ),
    "positions of another shape": (
        dict(input_ids=[[1, 2]], position_ids=np.zeros((5, 1, 2))),
        "position_ids has shape",
    ),
    "image tokens without image": (dict(input_ids=[[IMAGE]]), "no image left"),
    "video tokens without video": (dict(input_ids=[[VIDEO, 1]]), "no video left"),
    "image without tokens": (
        dict(input_ids=[[1]], pixel_values=np.zeros((4, 24)), image_grid_thw=[[1, 2, 2]]),
        "tokens of 0",
    ),
    "too few image tokens": (
        dict(input_ids=[[IMAGE, 1]], pixel_values=np.zeros((8, 24)), image_grid_thw=[[1, 2, 4]]),
        "takes 2",
    ),
    "pixels without grid": (
        dict(input_ids=[[IMAGE]], pixel_values=np.zeros((4, 24))),
        "without image_grid_thw",
    ),
    "grid without pixels": (
        dict(input_ids=[[IMAGE]], image_grid_thw=[[1, 2, 2]]),
        "without pixel_values",
    ),
    "grid and pixels disagree": (
        dict(input_ids=[[IMAGE]], pixel_values=np.zeros((8, 24)), image_grid_thw=[[1, 2, 2]]),
        "hold 8",
    ),
    "patches of another size": (
        dict(input_ids=[[IMAGE]], pixel_values=np.zeros((4, 12)), image_grid_thw=[[1, 2, 2]]),
        "24",
    ),
    "odd grid": (
        dict(input_ids=[[IMAGE]], pixel_values=np.zeros((6, 24)), image_grid_thw=[[1, 2, 3]]),
        r"\[1, 2, 3\]",
    ),
    "NaN pixels": (
        dict(
            input_ids=[[IMAGE]], pixel_values=np.full((4, 24), np.nan), image_grid_thw=[[1, 2, 2]]
        ),
        "NaN",
    ),
    "flat grid": (
        dict(input_ids=[[IMAGE]], pixel_values=np.zeros((4, 24)), image_grid_thw=[1, 2, 2]),
        "grid_thw has shape",
    ),
    "seconds for no video": (
        dict(input_ids=[[1]], second_per_grid_ts=[1.0]),
        "1 entries for 0 videos",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_batches_are_named(config, name):
    batch, culprit = BAD[name]
    with pytest.raises(InfiniteVLError, match=culprit) as error:
        build_inputs(config, **batch)
    assert len(str(error.value).splitlines()) <= 10
