"""Attention for Hopper: the plan against the mask, and the frame around the kernels.

Not every JAX can interpret these kernels on a CPU (test_mosaic_gpu_interpreted.py): here they are
lowered, and dense products over the same ranges of rows take their place.
"""

import dense_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import Case

from pallas_kernels.attention import Mask, reference
from pallas_kernels.attention.hopper import attention as attention_hopper
from pallas_kernels.attention.hopper import forward as attention_forward
from pallas_kernels.testing.parity import in_float64, poison, rel_rms, with_gradients

CASES = {
    "causal": Case(300, Mask(aligned=True), (4, 2), 128),
    "window": Case(457, Mask(window=100, aligned=True), (4, 2), 128, batch=2),
    "window longer than the row": Case(130, Mask(window=8192, aligned=True), (4, 1), 128, pads=5),
    "packed": Case(400, Mask(window=70, aligned=True), (2, 1), 128, segments=(3, 200, 1, 140)),
    "packed, not causal": Case(
        300, Mask(causal=False, aligned=True), (2, 1), 128, segments=(64, 129, 50)
    ),
    "window, not causal": Case(
        300, Mask(causal=False, window=33, aligned=True), (4, 2), 128, pads=40
    ),
    "narrow": Case(200, Mask(window=64, aligned=True), (4, 2), 64),
    "tower": Case(
        300, Mask(causal=False, window=64, aligned=True), (3, 3), 80, segments=(64, 64, 32, 100)
    ),
    "three on one": Case(200, Mask(window=64, aligned=True), (3, 1), 128),
}
CACHED = {
    "ring": Case(150, Mask(window=160), (4, 2), 128, pads=4, cached=200),
    "no window": Case(70, Mask(), (2, 1), 128, cached=60, batch=2),
}


def compare(case, out_tolerance=5e-3, gradient_tolerance=8e-3):
    """Value and gradient in bfloat16, pads poisoned, against the reference in float64 on the same
    numbers."""
    tokens = case.tokens()
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in case.tensors()]
    *qkv, d_out, d_lse = rounded
    calls = {"mask": case.mask, "scale": case.scale}
    wanted, gradients = in_float64(
        with_gradients(lambda *a, **t: reference.attention(*a, **t, **calls))
    )(qkv, (d_out, d_lse), tokens)
    places = tokens["q_token_index"], tokens["k_token_index"], tokens["k_token_index"]
    poisoned = [
        jnp.asarray(poison(x, place), jnp.bfloat16) for x, place in zip(qkv, places, strict=True)
    ]
    ours, d_ours = with_gradients(lambda *a, **t: attention_hopper.attention(*a, **t, **calls))(
        poisoned, (jnp.asarray(d_out), jnp.asarray(d_lse)), tokens
    )
    names = ["out", "lse", "d_q", "d_k", "d_v"]
    for name, a, b in zip(names, (*ours, *d_ours), (*wanted, *gradients), strict=True):
        a = a.astype(np.float64)
        assert not np.isnan(a).any(), name
        np.testing.assert_array_equal(np.isinf(a), np.isinf(b), err_msg=name)
        real = np.isfinite(b)
        error = rel_rms(a[real], b[real])
        assert error <= (gradient_tolerance if name.startswith("d_") else out_tolerance), (
            name,
            error,
        )


@pytest.mark.parametrize("name", CASES)
def test_runs_are_the_mask(name):
    case = CASES[name]
    tokens = case.tokens()
    token_index, segment_ids = tokens["q_token_index"], tokens["q_segment_ids"]
    seen = np.asarray(case.mask.visible(token_index, token_index, segment_ids, segment_ids))
    first, last, seen_first, seen_last = (
        np.asarray(x) for x in attention_hopper.visible_ranges(token_index, segment_ids, case.mask)
    )
    row = np.arange(case.length)
    np.testing.assert_array_equal((row >= first[:, :, None]) & (row <= last[:, :, None]), seen)
    np.testing.assert_array_equal(
        (row >= seen_first[:, :, None]) & (row <= seen_last[:, :, None]), seen.swapaxes(1, 2)
    )


@pytest.mark.parametrize("name", CACHED)
def test_runs_among_sorted_keys_are_the_mask(name):
    case = CACHED[name]
    tokens = case.tokens()
    first, last = (
        np.asarray(x)
        for x in attention_hopper.cached_visible_ranges(
            tokens["q_token_index"], tokens["k_token_index"], case.mask
        )
    )
    k_token_index = np.sort(tokens["k_token_index"], axis=1)
    seen = np.asarray(case.mask.visible(tokens["q_token_index"], k_token_index, None, None))
    row = np.arange(k_token_index.shape[1])
    np.testing.assert_array_equal((row >= first[:, :, None]) & (row <= last[:, :, None]), seen)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_blocks_cover_what_is_seen(name, strict):
    case, rows, keys = CASES[name], 64, 32
    tokens = case.tokens()
    first, last, *_ = attention_hopper.visible_ranges(
        tokens["q_token_index"], tokens["q_segment_ids"], case.mask
    )
    first, last = attention_hopper.pad_to_blocks(first, 0), attention_hopper.pad_to_blocks(last, -1)
    length = first.shape[1]
    column = np.arange(length)
    seen = (column >= first[:, :, None]) & (column <= last[:, :, None])
    # [b, tile, block, row, key]
    seen = seen.reshape(-1, length // rows, rows, length // keys, keys).swapaxes(2, 3)
    real = np.asarray(first <= last).reshape(-1, length // rows, 1, rows, 1)
    bounds = np.asarray(attention_forward.tile_blocks(first, last, rows, keys, strict))
    begin, whole, broken, end = np.moveaxis(bounds, 2, 0)[..., None]
    assert (begin <= whole).all() and (whole <= broken).all() and (broken <= end).all()
    block = np.arange(length // keys)
    assert not (seen.any(axis=(3, 4)) & ~((block >= begin) & (block < end))).any()
    called_whole = (block >= whole) & (block < broken)
    assert (seen | (~real & (not strict))).all(axis=(3, 4))[called_whole].all()


@pytest.mark.parametrize("name", CASES)
def test_frame(name, monkeypatch):
    dense_kernels.replace(monkeypatch)
    compare(CASES[name])


@pytest.mark.parametrize("name", CACHED)
def test_frame_of_cached_keys(name, monkeypatch):
    dense_kernels.replace(monkeypatch)
    compare(CACHED[name])


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("window", 2), ("packed", 2), ("narrow", 2), ("ring", 1), ("tower", 2), ("three on one", 2)],
)
def test_lowers_for_cuda(name, kernels):
    case = (CASES | CACHED)[name]
    q, k, v = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in case.tensors()[:3])
    tokens = {name: x if x is None else jnp.asarray(x) for name, x in case.tokens().items()}

    def run(q, k, v):
        outputs, pull = jax.vjp(
            lambda *a: attention_hopper.attention(*a, **tokens, mask=case.mask, scale=0.1), q, k, v
        )
        return outputs, pull(outputs)

    text = jax.jit(run).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == kernels


def test_refuses_by_name():
    shapes = {"q": (1, 64, 4, 128), "k": (1, 64, 2, 128), "v": (1, 64, 2, 128)}
    mask = Mask(window=8, aligned=True)

    def reason(mask=mask, scale=1.0, dtype=jnp.bfloat16, segments=False, **changed):
        arrays = {
            name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in (shapes | changed).items()
        }
        return attention_hopper.supports(
            **arrays, mask=mask, scale=scale, q_segment_ids=0 if segments else None
        )

    assert reason() is None
    assert reason(Mask(window=8), k=(1, 65, 2, 128), v=(1, 65, 2, 128)) is None
    assert "packed segments" in reason(Mask(window=8), segments=True)
    assert "not causal" in reason(Mask(window=8, causal=False))
    assert "single query" in reason(q=(1, 1, 4, 128), k=(1, 1, 2, 128), v=(1, 1, 2, 128))
    assert "sinks" in reason(Mask(window=8, sinks=1, aligned=True))
    assert "float32" in reason(dtype=jnp.float32)
    assert reason(q=(1, 64, 4, 80), k=(1, 64, 4, 80), v=(1, 64, 4, 80)) is None
    assert "256" in reason(v=(1, 64, 2, 256))
    assert "positive" in reason(scale=0.0)
    q, k = jnp.zeros((1, 64, 4, 128)), jnp.zeros((1, 64, 2, 128))
    token_index = jnp.arange(64)[None]
    with pytest.raises(ValueError, match="use the implementation xla"):
        attention_hopper.attention(q, k, k, token_index, token_index, None, None, mask, 1.0)
