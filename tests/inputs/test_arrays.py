"""What a call is given: arrays of any library read alike, and everything else named."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from tiny import conversation, hybrid_config

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.inputs.arrays import as_numpy, number, whole_number
from infinitevl_jax.inputs.model_inputs import build_inputs

VALUES = np.array([[1.0, -2.5, 3.140625, 65280.0]], np.float32)  # each exact in bfloat16

HALVES = {
    "torch bfloat16": lambda x: torch.tensor(x).bfloat16(),
    "torch float16": lambda x: torch.tensor(x).half(),
    "torch that requires grad": lambda x: torch.tensor(x, requires_grad=True),
    "torch bfloat16 in a graph": lambda x: torch.tensor(x, requires_grad=True).bfloat16() * 1,
    "torch transposed": lambda x: torch.tensor(x.T).bfloat16().T,
    "torch parameter": lambda x: torch.nn.Parameter(torch.tensor(x).bfloat16()),
    "jax bfloat16": lambda x: jnp.asarray(x, "bfloat16"),
    "numpy bfloat16": lambda x: x.astype(ml_dtypes.bfloat16),
    "list of torch rows": lambda x: [torch.tensor(row).bfloat16() for row in x],
}


@pytest.mark.parametrize("name", HALVES)
def test_halves_widen_exactly(name):
    read = as_numpy(HALVES[name](VALUES), "pixel_values")
    assert read.dtype == np.float32 and read.tolist() == VALUES.tolist()


def test_a_batch_of_torch_is_the_batch_of_its_numbers():
    """Whole numbers of any width, a mask of bools, pixels in bfloat16, seconds as a list of
    tensors."""
    config, batch = hybrid_config(), conversation(hybrid_config())
    batch = {name: np.asarray(value) for name, value in batch.items()}
    for name in ("pixel_values", "pixel_values_videos"):
        batch[name] = batch[name].astype(ml_dtypes.bfloat16).astype(np.float32)
    batch["attention_mask"] = np.ones_like(batch["input_ids"])
    given = {name: torch.tensor(value) for name, value in batch.items()}
    given |= {
        name: given[name].bfloat16().requires_grad_()
        for name in ("pixel_values", "pixel_values_videos")
    }
    given |= {
        "input_ids": given["input_ids"].int(),
        "attention_mask": given["attention_mask"].bool(),
    }
    given["second_per_grid_ts"] = list(given["second_per_grid_ts"].bfloat16())
    expected, read = build_inputs(config, **batch), build_inputs(config, **given)
    for a, b in zip(
        (*expected.decoder, expected.patches.pixels),
        (*read.decoder, read.patches.pixels),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def with_vision(**changes):
    return lambda config: build_inputs(config, **conversation(config) | changes)


def with_positions(change):
    def action(config):
        batch = conversation(config)
        place = np.broadcast_to(
            np.arange(batch["input_ids"].shape[1]), (3, *batch["input_ids"].shape)
        )
        return build_inputs(config, **batch, position_ids=change(place))

    return action


BAD = {
    "ids as floats": (lambda c: build_inputs(c, [[1.0, 2.0]]), "dtype float64"),
    "ids as bools": (lambda c: build_inputs(c, [[True]]), "dtype bool"),
    "ids as text": (lambda c: build_inputs(c, "Hello"), "no real numbers"),
    "ids as words": (lambda c: build_inputs(c, [["a", "b"]]), "no real numbers"),
    "no ids": (lambda c: build_inputs(c, None), "no real numbers"),
    "rows of unequal length": (
        lambda c: build_inputs(c, [[1, 2], [3]]),
        "cannot be read as an array",
    ),
    "one row without a batch": (
        lambda c: build_inputs(c, [1, 2]),
        r"pass integers \[batch, tokens\]",
    ),
    "an id of 2^40": (lambda c: build_inputs(c, [[2**40]]), "input_ids holds 1099511627776"),
    "an id of 2^64 - 1": (
        lambda c: build_inputs(c, np.array([[2**64 - 1]], np.uint64)),
        "input_ids holds 18446744073709551615",
    ),
    "a mask to add": (
        lambda c: build_inputs(c, [[1, 2]], [[0.0, -np.inf]]),
        "attention_mask holds -inf",
    ),
    "a mask of twos": (lambda c: build_inputs(c, [[1, 2]], [[2, 1]]), "attention_mask holds 2"),
    "a mask of NaN": (
        lambda c: build_inputs(c, [[1, 2]], [[np.nan, 1]]),
        "attention_mask holds nan",
    ),
    "a mask of words": (
        lambda c: build_inputs(c, [[1, 2]], [["yes", "no"]]),
        "attention_mask has dtype",
    ),
    "a causal mask": (
        lambda c: build_inputs(c, [[1, 2]], np.ones((1, 1, 2, 2))),
        r"shape \(1, 1, 2, 2\)",
    ),
    "a tensor without values": (
        lambda c: build_inputs(c, torch.zeros((1, 2), dtype=torch.int64, device="meta")),
        "cannot be read",
    ),
    "pixels as bytes": (
        with_vision(pixel_values=np.ones((60, 24), np.uint8)),
        "pixel_values has dtype uint8",
    ),
    "pixels of another patch size": (
        with_vision(pixel_values=np.ones((60, 20))),
        r"pixel_values has shape \(60, 20\)",
    ),
    "pixels of no shape": (with_vision(pixel_values=0.5), r"pixel_values has shape \(\)"),
    "pixels of infinity": (
        with_vision(pixel_values=np.full((60, 24), np.inf)),
        "pixel_values .* holds inf",
    ),
    "a grid of fractions": (with_vision(image_grid_thw=[[1, 6.5, 10]]), "grid_thw has shape"),
    "a grid of nothing": (with_vision(image_grid_thw=[[0, 6, 10]]), "grid_thw holds 0"),
    "a grid of 2^32": (
        with_vision(image_grid_thw=[[2**32, 2**32, 2]]),
        "grid_thw holds 4294967296",
    ),
    "a negative grid": (with_vision(video_grid_thw=[[3, -4, -6]]), "grid_thw holds -6"),
    "seconds of NaN": (with_vision(second_per_grid_ts=[np.nan]), "second_per_grid_ts .* holds NaN"),
    "seconds of infinity": (
        with_vision(second_per_grid_ts=[np.inf]),
        "second_per_grid_ts .* holds inf",
    ),
    "negative seconds": (
        with_vision(second_per_grid_ts=[-1.5]),
        "second_per_grid_ts .* holds -1.5",
    ),
    "seconds of 1e30": (with_vision(second_per_grid_ts=[1e30]), "second_per_grid_ts"),
    "seconds beyond the last position": (
        with_vision(second_per_grid_ts=[1e9]),
        "beyond position 2,147,483,646",
    ),
    "seconds as text": (with_vision(second_per_grid_ts=["1.5"]), "second_per_grid_ts has dtype"),
    "positions of NaN": (with_positions(lambda p: p * np.nan), "position_ids are of type float64"),
    "positions of fractions": (
        with_positions(lambda p: p + 0.5),
        "position_ids are of type float64",
    ),
    "positions of 2^40": (with_positions(lambda p: p + 2**40), "position_ids hold 1,099,5"),
    "positions of 2^31 - 1": (
        with_positions(lambda p: p * 0 + 2**31 - 1),
        "position_ids hold 2,147,483,647",
    ),
    "negative positions": (with_positions(lambda p: p - 1), "position_ids hold -1"),
    "two axes of positions": (with_positions(lambda p: p[:2]), r"pass \[3, 1, "),
    "a cache near the last position": (
        lambda c: build_inputs(c, [[1, 2, 3]], start=[2**31 - 3]),
        "comes to position 2,147,483,647",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_is_named(name):
    action, culprit = BAD[name]
    with pytest.raises(InfiniteVLError, match=culprit):
        action(hybrid_config())


@pytest.mark.parametrize(
    "value",
    [3, np.int64(3), np.array(3), torch.tensor(3), jnp.asarray(3)],
    ids=lambda v: type(v).__name__,
)
def test_a_number_of_any_library(value):
    assert whole_number(value, "n", 0) == 3 and number(value, "x", 0, 9, "") == 3


@pytest.mark.parametrize(
    "value", [True, 1.5, "3", None, -1, 2**31, np.nan, [3], np.array([3])], ids=repr
)
def test_what_is_no_whole_number_from_0(value):
    with pytest.raises(InfiniteVLError, match="n is "):
        whole_number(value, "n", 0)
