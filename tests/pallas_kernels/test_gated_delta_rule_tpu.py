"""The TPU kernels of the gated delta rule, interpreted on the CPU, against the float64
recurrence."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta_rule import reference
from pallas_kernels.gated_delta_rule.tpu import gated_delta_rule as delta_tpu
from pallas_kernels.gated_delta_rule.tuning import TPU as TPUDelta
from pallas_kernels.testing import parity
from pallas_kernels.testing.cells import ALLOWED
from pallas_kernels.testing.comparison import INTERPRETED
from pallas_kernels.testing.parity import GATES, poison, rel_rms, unit

NAMES = ("out", "state", "d_q", "d_k", "d_v", "d_g", "d_beta", "d_initial_state")
F32 = dict.fromkeys(NAMES, 1e-4)
interpreted = partial(delta_tpu.gated_delta_rule, interpret=INTERPRETED)
ours = parity.with_gradients(interpreted)
truth = parity.in_float64(parity.with_gradients(reference.gated_delta_rule, optimise=True))


def case(length, gates="mild", batch=1, heads=2, key_dim=128, value_dim=128, seed=0):
    """Inputs and cotangents, float32. All keys of the last head are equal."""
    rng = np.random.default_rng(seed)
    lead = (batch, length, heads)
    k = unit(rng, (*lead, key_dim))
    k[:, :, -1] = k[:, :1, -1]
    inputs = (
        unit(rng, (*lead, key_dim)),
        k,
        rng.standard_normal((*lead, value_dim)),
        GATES[gates](rng, lead),
        1 / (1 + np.exp(-2 * rng.standard_normal(lead))),
        rng.standard_normal((batch, heads, key_dim, value_dim)),
    )
    cotangents = (
        rng.standard_normal((*lead, value_dim)),
        rng.standard_normal((batch, heads, key_dim, value_dim)),
    )
    return tuple(np.float32(x) for x in inputs), tuple(np.float32(x) for x in cotangents)


def narrow(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16))


def errors(got, want):
    """The largest of a head. Both are (results, gradients)."""

    def largest(name, a, b):
        axis = 1 if name.endswith("state") else 2
        pairs = zip(np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0), strict=True)
        return max(rel_rms(*pair) for pair in pairs)

    return {
        name: largest(name, a, b)
        for name, a, b in zip(NAMES, (*got[0], *got[1]), (*want[0], *want[1]), strict=True)
    }


def assert_close(got, want, tolerance=F32):
    found = errors(got, want)
    assert all(found[name] <= tolerance[name] for name in NAMES), found


@pytest.mark.parametrize("length", (2, 65, 300))
def test_equals_float64_recurrence(length):
    for gates in GATES:
        inputs, cotangents = case(length, gates)
        assert_close(ours(inputs, cotangents), truth(inputs, cotangents))


@pytest.mark.parametrize("length", (63, 300))
def test_bfloat16(length):
    for gates in GATES:
        inputs, cotangents = case(length, gates, value_dim=256)
        inputs, cotangents = (
            (*map(narrow, inputs[:3]), *inputs[3:]),
            (narrow(cotangents[0]), cotangents[1]),
        )
        want = truth(inputs, cotangents)
        got = ours(inputs, cotangents)
        assert [x.dtype for x in (*got[0], *got[1])] == [jnp.bfloat16, np.float32] + [
            jnp.bfloat16
        ] * 3 + [np.float32] * 3
        assert_close(got, want, ALLOWED)


def test_blocks_of_heads_and_an_odd_number_of_chunks():
    inputs, cotangents = case(260, batch=2, heads=4, value_dim=384)
    assert (
        delta_tpu.block_heads(4, 128, 384, jnp.float32, TPUDelta.backward) == 1
        and delta_tpu.block_heads(4, 128, 384, jnp.float32) == 2
    )
    assert_close(ours(inputs, cotangents), truth(inputs, cotangents))


def test_gates_beyond_float32_range():
    inputs, cotangents = case(200, "spread", heads=3)
    g = inputs[3].copy()
    g[0, ::7], g[0, 3::11] = -np.inf, -1e6
    inputs = (*inputs[:3], g, *inputs[4:])
    assert_close(ours(inputs, cotangents), truth(inputs, cotangents))


@pytest.mark.parametrize("kind", ("float32", "bfloat16"))
def test_packed_rows(kind):
    token_index, segment_ids = parity.packing((37, 1, 128, 2, 70), 260)
    others = {"token_index": token_index, "segment_ids": segment_ids}
    inputs, cotangents = case(260, "mild")
    if kind == "bfloat16":
        inputs, cotangents = (
            (*map(narrow, inputs[:3]), *inputs[3:]),
            (narrow(cotangents[0]), cotangents[1]),
        )
    got = ours(inputs, cotangents, others)
    assert_close(got, truth(inputs, cotangents, others), F32 if kind == "float32" else ALLOWED)
    assert not any(np.any(x[:, 238:]) for x in (got[0][0], *got[1][:5]))


def test_pads_anywhere_and_returning_segments():
    inputs, cotangents = case(150, "spread", batch=3)
    rng = np.random.default_rng(1)
    token_index = np.where(rng.random((3, 150)) < 0.3, -1, 0).astype(np.int32)
    token_index[0, :70], token_index[1] = -1, -1
    segment_ids = rng.choice([0, 1], (3, 150), p=[0.9, 0.1]).astype(np.int32)
    others = {"token_index": token_index, "segment_ids": segment_ids}
    inputs[5][1, 0, 0, :3] = -0.0, 1e-42, 1e30
    got = ours(inputs, cotangents, others)
    assert_close(got, truth(inputs, cotangents, others))
    assert got[0][1][1].tobytes() == inputs[5][1].tobytes()
    np.testing.assert_array_equal(got[1][5][1], cotangents[1][1])

    ruined = [poison(x, token_index) for x in inputs[:5]]
    again = ours((*ruined, inputs[5]), (poison(cotangents[0], token_index), cotangents[1]), others)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_gradients_and_without_initial_state():
    """Undifferentiated, the kernels save nothing; the results are the same."""
    (*inputs, _), cotangents = case(200, heads=3)
    zeros = np.zeros_like(cotangents[1])
    got = jax.jit(interpreted)(*inputs)
    want, _ = ours((*inputs, zeros), cotangents)
    assert max(rel_rms(a, b) for a, b in zip(got, want, strict=True)) <= 1e-6


def test_refusals():
    @cache
    def arrays(key_dim=128, value_dim=256, length=8, dtype=jnp.bfloat16, other=None):
        return tuple(
            jax.ShapeDtypeStruct((1, length, 2, width), kind)
            for width, kind in ((key_dim, dtype), (key_dim, dtype), (value_dim, other or dtype))
        )

    assert (
        delta_tpu.supports(*arrays()) is None
        and delta_tpu.supports(*arrays(dtype=jnp.float32)) is None
    )
    assert "values 192 wide" in delta_tpu.supports(*arrays(value_dim=192))
    assert "keys 64 wide" in delta_tpu.supports(*arrays(key_dim=64))
    assert "rows of 1 tokens" in delta_tpu.supports(*arrays(length=1))
    assert "float32" in delta_tpu.supports(*arrays(other=jnp.float32))
    with pytest.raises(ValueError, match="use the implementation xla"):
        jax.eval_shape(
            delta_tpu.gated_delta_rule,
            *arrays(key_dim=64),
            *[jax.ShapeDtypeStruct((1, 8, 2), jnp.float32)] * 2,
        )
