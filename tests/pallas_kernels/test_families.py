"""What other hybrid models need of the contracts: heads 256 wide, grouped value heads. Kernels
refuse them by name, xla runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dispatch import HOPPER, TPU

from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.sharding import make_mesh, operator_mesh
from pallas_kernels.attention import KVCache, Mask, reference, xla
from pallas_kernels.attention.implementations import ATTENTION, ATTENTION_STEP
from pallas_kernels.dispatch import Dispatch
from pallas_kernels.gated_delta_rule import DeltaState, gated_delta_rule
from pallas_kernels.gated_delta_rule import reference as delta_reference
from pallas_kernels.gated_delta_rule import step as delta_step
from pallas_kernels.gated_delta_rule import xla as delta_xla
from pallas_kernels.gated_delta_rule.api import Inputs, Weights
from pallas_kernels.gated_delta_rule.implementations import GATED_DELTA_RULE, GATED_DELTA_RULE_STEP
from pallas_kernels.gated_delta_rule.partition import (
    partition_gated_delta_rule,
    partition_gated_delta_rule_step,
)
from pallas_kernels.testing.parity import GATES, in_float64, packing, rel_rms, unit, with_gradients

B16 = jnp.bfloat16


def shaped(*shape, dtype=B16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("device", "name"), [(HOPPER, "mosaic_gpu"), (TPU, "mosaic_tpu")], ids=["hopper", "tpu"]
)
def test_heads_256_wide_are_refused_by_name(device, name):
    q, k = shaped(1, 256, 8, 256), shaped(1, 256, 2, 256)
    chosen, reasons = Dispatch(ATTENTION, device).choose(q, k, k, mask=Mask(aligned=True))
    assert chosen.name == "xla" and any(
        r.startswith(f"{name}: head widths 256 and 256: ") and r.endswith("128") for r in reasons
    )


def test_a_step_with_heads_256_wide_is_refused_by_name():
    q, k, cache = shaped(1, 16, 256), shaped(1, 2, 256), KVCache(*[shaped(1, 256, 2, 256)] * 2)
    chosen, reasons = Dispatch(ATTENTION_STEP, HOPPER).choose(
        q, k, k, cache, shaped(1, dtype=jnp.int32)
    )
    assert chosen.name == "xla" and reasons == ["mosaic_gpu: heads 256 and 256 wide: 128 only"]


def test_heads_256_wide():
    rng = np.random.default_rng(0)
    q, k, v, d_out = (np.float32(rng.normal(size=(1, 300, heads, 256))) for heads in (4, 2, 2, 4))
    cotangents = d_out, np.float32(rng.normal(size=(1, 300, 4)))

    def run(function):
        return with_gradients(
            lambda q, k, v: function(q, k, v, mask=Mask(window=100, aligned=True))
        )

    want = jax.tree.leaves(in_float64(run(reference.attention))((q, k, v), cotangents, {}))
    for a, b in zip(jax.tree.leaves(run(xla.attention)((q, k, v), cotangents)), want, strict=True):
        assert rel_rms(a, b) <= 1e-5


def grouped(length=70, key_heads=2, value_heads=6, batch=1):
    """2 key heads for 6 value heads, packed, and cotangents."""
    rng = np.random.default_rng(length)
    keys, values = (batch, length, key_heads, 8), (batch, length, value_heads)
    inputs = (
        unit(rng, keys),
        unit(rng, keys),
        rng.normal(size=(*values, 16)),
        GATES["mild"](rng, values),
        rng.random(values),
    )
    state = rng.normal(size=(batch, value_heads, 8, 16))
    cotangents = rng.normal(size=(*values, 16)), rng.normal(size=state.shape)
    index, segment = (
        np.tile(x, (batch, 1)) for x in packing([length // 2, 3, length // 3], length)
    )
    as_float32 = [tuple(map(np.float32, x)) for x in ((*inputs, state), cotangents)]
    return *as_float32, {"token_index": index, "segment_ids": segment}


def test_value_heads_share_a_key_head():
    inputs, cotangents, tokens = grouped()
    exact = in_float64(with_gradients(delta_reference.gated_delta_rule))
    want = exact(inputs, cotangents, tokens)
    for a, b in zip(
        jax.tree.leaves(with_gradients(delta_xla.gated_delta_rule)(inputs, cotangents, tokens)),
        jax.tree.leaves(want),
        strict=True,
    ):
        assert rel_rms(a, b) <= 1e-5
    # the same as each key head given to its three value heads, side by side
    q, k, *rest = inputs
    repeated = exact((np.repeat(q, 3, axis=2), np.repeat(k, 3, axis=2), *rest), cotangents, tokens)
    np.testing.assert_array_equal(want[0][0], repeated[0][0])
    for a, b in zip(want[1][:2], repeated[1][:2], strict=True):
        assert rel_rms(a, b.reshape(1, 70, 2, 3, 8).sum(3)) <= 1e-12
    assert want[1][0].shape == (1, 70, 2, 8)


@pytest.mark.parametrize("cut", [1, 20, 69])
def test_a_state_is_passed_on(cut):
    """Two calls give what one call gives, also when one of them is a single token. The cuts are
    inside a sequence, because a call's state belongs to its first one, or before a pad."""
    (*inputs, state), _, tokens = grouped()
    run = jax.jit(delta_xla.gated_delta_rule)

    def part(state, start, stop):
        pieces = [x[:, start:stop] for x in (*inputs, *tokens.values())]
        return run(*pieces[:5], state, *pieces[5:])

    out, last = part(state, 0, 70)
    first, between = part(state, 0, cut)
    second, end = part(between, cut, 70)
    assert rel_rms(np.concatenate([first, second], axis=1), out) <= 1e-6
    assert rel_rms(end, last) <= 1e-6


def test_the_backward_pass_saves_key_heads_once():
    """q and k are saved as they came, and K K^T and Q K^T are computed for each key head."""
    inputs, _, _ = grouped(length=128, key_heads=2, value_heads=6)
    _, pull = jax.vjp(delta_xla.gated_delta_rule, *inputs)
    saved = [x.shape for x in jax.tree.leaves(pull) if hasattr(x, "shape")]
    assert saved.count((1, 128, 2, 8)) == 2 and (1, 128, 6, 8) not in saved
    program = str(jax.make_jaxpr(delta_xla.gated_delta_rule)(*inputs))
    assert "f32[2,1,2,64,64]" in program  # [chunks, batch, key heads, C, C]


@pytest.mark.parametrize(
    ("device", "name"), [(HOPPER, "mosaic_gpu"), (TPU, "mosaic_tpu")], ids=["hopper", "tpu"]
)
def test_grouped_value_heads_are_refused_by_name(device, name):
    q, v, g = shaped(1, 128, 4, 128), shaped(1, 128, 8, 128), shaped(1, 128, 8, dtype=jnp.float32)
    chosen, reasons = Dispatch(GATED_DELTA_RULE, device).choose(q, q, v, g, g)
    assert (
        chosen.name == "xla"
        and f"{name}: 4 key heads for 8 value heads: as many of each" in reasons
    )


def test_a_number_of_value_heads_that_does_not_fit():
    q, v, g = jnp.zeros((1, 4, 2, 8)), jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 3))
    with pytest.raises(
        ValueError, match=r"gated_delta_rule: v is \[1, 4, 3, 8\]\n  -> give it \[1, 4, 2, 8\]"
    ):
        gated_delta_rule(q, q, v, g, g)


def step_arguments(key_heads=2, value_heads=6, keys=8, values=16, batch=2):
    rng = np.random.default_rng(0)
    widths = key_heads * keys, key_heads * keys, value_heads * values

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    inputs = Inputs(*(normal(batch, n) for n in (*widths, widths[2], value_heads, value_heads)))
    weights = Weights(
        *(normal(4, n) for n in widths), normal(value_heads), normal(value_heads), normal(values)
    )
    state = DeltaState(
        normal(batch, value_heads, keys, values), *(normal(batch, 3, n) for n in widths)
    )
    return inputs, weights, state, jnp.asarray([4, -1], jnp.int32)


def test_a_step_with_grouped_value_heads():
    inputs, weights, state, index = step_arguments()
    out, new = delta_step.step(inputs, weights, state, index, 1e-5)

    def spread(x):
        """Channels of two key heads, each for its three value heads."""
        return jnp.repeat(x.reshape(*x.shape[:-1], 2, 8), 3, axis=-2).reshape(*x.shape[:-1], -1)

    wide_inputs = inputs._replace(q=spread(inputs.q), k=spread(inputs.k))
    wide_weights = weights._replace(q_conv=spread(weights.q_conv), k_conv=spread(weights.k_conv))
    wide_state = state._replace(
        q_conv_state=spread(state.q_conv_state), k_conv_state=spread(state.k_conv_state)
    )
    want, want_state = delta_step.step(wide_inputs, wide_weights, wide_state, index, 1e-5)
    assert (
        rel_rms(out, want) <= 1e-6
        and rel_rms(new.recurrent_state, want_state.recurrent_state) <= 1e-6
    )
    np.testing.assert_array_equal(spread(new.k_conv_state), want_state.k_conv_state)
    np.testing.assert_array_equal(new.recurrent_state[1], state.recurrent_state[1])


def test_a_step_with_grouped_value_heads_is_refused_by_name():
    inputs, weights, state, index = step_arguments(keys=128, values=128)
    chosen, reasons = Dispatch(GATED_DELTA_RULE_STEP, HOPPER).choose(
        inputs, weights, state, index, 1e-5
    )
    assert chosen.name == "xla" and reasons == [
        "mosaic_gpu: 2 key heads for 6 value heads: as many of each"
    ]


@pytest.mark.parametrize("tensor", [2, 4])
def test_grouped_value_heads_on_a_mesh(tensor):
    """Split over 2 devices; with 4, which do not divide the key heads, whole on each."""
    mesh = operator_mesh(make_mesh(RunConfig(fsdp=2, tensor=tensor), jax.devices()[: 2 * tensor]))
    inputs, cotangents, tokens = grouped(batch=2, value_heads=4)
    rule = with_gradients(delta_xla.gated_delta_rule)(inputs, cotangents, tokens)
    split = with_gradients(partition_gated_delta_rule(delta_xla.gated_delta_rule, mesh))(
        inputs, cotangents, tokens
    )
    arguments = step_arguments(value_heads=4)
    step = jax.jit(delta_step.step, static_argnums=4)(*arguments, 1e-5)
    split_step = jax.jit(partition_gated_delta_rule_step(delta_step.step, mesh), static_argnums=4)(
        *arguments, 1e-5
    )
    for a, b in zip(
        jax.tree.leaves((split, split_step)), jax.tree.leaves((rule, step)), strict=True
    ):
        assert rel_rms(a, b) <= 1e-6
