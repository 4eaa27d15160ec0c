"""The gated delta rule for Hopper: the frame around the kernels, and their lowering.

Not every JAX can interpret these kernels on a CPU (test_mosaic_gpu_interpreted.py): here they are
lowered, and the portable path over the same whole chunks takes their place.
"""

import dense_kernels
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta_rule import reference
from pallas_kernels.gated_delta_rule.hopper import chunks
from pallas_kernels.gated_delta_rule.hopper import gated_delta_rule as delta_hopper
from pallas_kernels.testing.parity import (
    GATES,
    in_float64,
    packing,
    padding,
    poison,
    rel_rms,
    unit,
    with_gradients,
)

INPUTS = ("q", "k", "v", "g", "beta", "initial_state")
RESULTS = ("out", "state")
ALLOWED = (
    dict.fromkeys((*RESULTS,), 5e-3)
    | dict.fromkeys(("q", "k", "v", "initial_state"), 8e-3)
    | dict.fromkeys(("g", "beta"), 2e-2)
)
truth = in_float64(with_gradients(reference.gated_delta_rule, optimise=True))
ours = with_gradients(delta_hopper.gated_delta_rule)


@pytest.fixture
def dense(monkeypatch):
    dense_kernels.replace(monkeypatch)


def case(length, batch=1, heads=2, value=64, gates="spread", seed=0):
    """Inputs and cotangents in float32; what is bfloat16 to the kernels holds such numbers."""
    rng = np.random.default_rng(seed)
    lead = batch, length, heads
    wide = (
        unit(rng, (*lead, 128)) * 128**-0.5,
        unit(rng, (*lead, 128)),
        rng.standard_normal((*lead, value)),
    )
    state, cotangent = rng.standard_normal((2, batch, heads, 128, value))
    rest = GATES[gates](rng, lead), 1 / (1 + np.exp(-2 * rng.standard_normal(lead))), state
    out = rng.standard_normal((*lead, value))
    return [*(rounded(x) for x in wide), *(np.float32(x) for x in rest)], [
        rounded(out),
        np.float32(cotangent),
    ]


def rounded(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


def as_given(inputs):
    return [jnp.asarray(x, jnp.bfloat16) for x in inputs[:3]] + [jnp.asarray(x) for x in inputs[3:]]


def tokens(length):
    """Rows that are packed, padded and empty."""
    token_index, segment_ids = packing((3, 64, 1, length - 80), length)
    more = padding([length // 2, 0], length)
    return {
        "token_index": np.concatenate([token_index, more]),
        "segment_ids": np.concatenate([segment_ids, np.zeros_like(more)]),
    }


@pytest.mark.parametrize(("length", "others"), [(65, {}), (64, {}), (150, tokens(150))])
def test_frame(length, others, dense):
    inputs, cotangents = case(length, batch=3 if others else 1)
    want = truth(inputs, cotangents, others)
    poisoned = (
        [*(poison(x, others["token_index"]) for x in inputs[:5]), inputs[5]] if others else inputs
    )
    got = ours(as_given(poisoned), cotangents, others)
    for name, a, b in zip(
        (*RESULTS, *INPUTS), (*got[0], *got[1]), (*want[0], *want[1]), strict=True
    ):
        error = rel_rms(a, b)
        assert error <= ALLOWED[name], (name, error)
    if others:
        np.testing.assert_array_equal(got[0][1][2], inputs[5][2])
        assert not got[0][0][others["token_index"] < 0].any()


def test_no_state_is_zeros(dense):
    inputs, _ = case(70)
    want = delta_hopper.gated_delta_rule(*as_given([*inputs[:5], np.zeros_like(inputs[5])]))
    for a, b in zip(delta_hopper.gated_delta_rule(*as_given(inputs[:5])), want, strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_an_empty_row_keeps_its_negative_zeros(dense):
    inputs, _ = case(64)
    inputs[5] = np.full_like(inputs[5], -0.0)
    _, last = delta_hopper.gated_delta_rule(*as_given(inputs), token_index=jnp.full((1, 64), -1))
    assert np.signbit(last).all()


def test_starts_are_the_changes_between_valid_tokens():
    token_index = jnp.array([[0, 1, -1, 0, -1, 1, 0, -1]])
    segment_ids = jnp.array([[4, 4, 9, 5, 9, 5, 4, 4]])
    assert delta_hopper.sequence_starts(token_index, segment_ids).tolist() == [
        [0, 0, 0, 1, 0, 0, 1, 0]
    ]
    assert delta_hopper.sequence_starts(None, segment_ids).tolist() == [[0, 0, 1, 1, 1, 1, 1, 0]]


def test_joins_tile_the_lower_triangle():
    row, column = np.mgrid[:64, :64]
    levels = [np.asarray(chunks.joins(row, column, level)) for level in range(6)]
    np.testing.assert_array_equal(sum(levels), column < row)
    assert all(
        level.reshape(64 >> i + 1, 2 << i, 64 >> i + 1, 2 << i).any((0, 2)).sum() == 4**i
        for i, level in enumerate(levels)
    )


def test_halves_carry_sixteen_bits():
    x = jnp.asarray(np.random.default_rng(0).standard_normal(1000), jnp.float32)
    high, low = chunks.rounded_halves(x)
    assert (
        float(
            jnp.abs(high.astype(jnp.float32) + low.astype(jnp.float32) - x).max() / jnp.abs(x).max()
        )
        < 2**-15
    )


@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("backward", [False, True])
def test_lowers_for_cuda(batch, backward):
    others = tokens(150)
    others = {name: np.resize(x, (batch, 150)) for name, x in others.items()} if batch > 1 else {}
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in as_given(case(150, batch, 3, 256)[0])]

    def run(*inputs):
        if not backward:
            return delta_hopper.gated_delta_rule(*inputs, **others)
        results, pull = jax.vjp(lambda *a: delta_hopper.gated_delta_rule(*a, **others), *inputs)
        return pull(results)

    text = jax.jit(run).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("gdn_chunks") and text.count("gdn_chunk_scan")


def test_refuses_by_name():
    def reason(length=64, key=128, value=256, dtype=jnp.bfloat16):
        wide = [jax.ShapeDtypeStruct((1, length, 2, width), dtype) for width in (key, key, value)]
        return delta_hopper.supports(
            *wide, *[jax.ShapeDtypeStruct((1, length, 2), jnp.float32)] * 2
        )

    assert reason() is None and reason(value=64) is None and reason(length=2) is None
    assert "float32" in reason(dtype=jnp.float32)
    assert "64 wide" in reason(key=64)
    assert "96 wide" in reason(value=96)
    assert "single token" in reason(length=1)
    assert "no tokens" in reason(length=0)
    with pytest.raises(ValueError, match="use the implementation xla"):
        delta_hopper.gated_delta_rule(
            *[jnp.zeros((1, 64, 1, 64))] * 3, *[jnp.zeros((1, 64, 1))] * 2
        )
