"""Token steps of both mixers: their definitions against the layers' own path, and the Hopper
kernels as far as a CPU goes (their results are checked by the parity matrix, on a GPU)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import initialised

from infinitevl_jax.config.model import TextConfig
from infinitevl_jax.nn.mixers.gated_delta_net import GatedDeltaNet
from infinitevl_jax.nn.mixers.softmax_attention import SoftmaxAttention
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.rope import rotate
from infinitevl_jax.nn.token_info import TokenInfo
from pallas_kernels.attention import KVCache
from pallas_kernels.attention import step as attention_step
from pallas_kernels.attention.hopper import step as attention_step_hopper
from pallas_kernels.gated_delta_rule import DeltaState, api
from pallas_kernels.gated_delta_rule import step as delta_step
from pallas_kernels.gated_delta_rule.hopper import step as delta_step_hopper
from pallas_kernels.testing.parity import rel_rms

CAPACITY = 8
CONFIG = TextConfig(
    hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_linear_heads=3,
    linear_head_dim=6,
    expand_v=2.0,
    sliding_window=CAPACITY,
    mrope_section=None,
    layer_types=("linear_attention", "sliding_attention"),
)


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def span(token_index, seed=0):
    """One token a sequence."""
    token_index = jnp.asarray(token_index, jnp.int32)
    angles = normal(len(token_index), 1, CONFIG.head_dim // 2, seed=seed)
    segment_ids = jnp.zeros((len(token_index), 1), jnp.int32)
    return TokenInfo(
        token_index[:, None],
        segment_ids,
        jnp.maximum(token_index, 0),
        jnp.cos(angles),
        jnp.sin(angles),
    )


def filled(spec, seed):
    return jax.tree.map(lambda s: normal(*s.shape, seed=seed).astype(s.dtype), spec)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_delta_step_is_the_layer(dtype):
    layer = initialised(GatedDeltaNet(CONFIG, Ops()))
    for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d):
        conv.weight[...] = normal(*conv.weight[...].shape, seed=1)
    now = span([4, -1, 0])
    x = normal(3, 1, CONFIG.hidden_size, seed=2).astype(dtype)
    state = DeltaState(*filled(layer.state_spec(3, None, dtype), seed=3))

    @nnx.jit
    def run(layer, x, state):
        past = jax.tree.map(lambda s: s, state)
        projections = (
            layer.q_proj,
            layer.k_proj,
            layer.v_proj,
            layer.g_proj,
            layer.a_proj,
            layer.b_proj,
        )
        inputs = api.Inputs(*(projection(x)[:, 0] for projection in projections))
        convolutions = (
            conv.weight[...] for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d)
        )
        weights = api.Weights(
            *convolutions, layer.A_log[...], layer.dt_bias[...], layer.o_norm.weight[...]
        )
        poisoned = jax.tree.map(lambda y: y.at[1].set(jnp.nan), inputs)
        out, new = delta_step.step(poisoned, weights, past, now.token_index[:, 0], layer.o_norm.eps)
        return layer(x, state, now), (layer.o_proj(out[:, None]), new)

    (want, want_state), (got, state_) = run(layer, x, state)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-3
    assert rel_rms(got, want) <= tolerance
    assert rel_rms(state_.recurrent_state, want_state.recurrent_state) <= tolerance
    for name in ("q_conv_state", "k_conv_state", "v_conv_state"):
        np.testing.assert_array_equal(getattr(state_, name), getattr(want_state, name))
    jax.tree.map(
        lambda old, new: np.testing.assert_array_equal(old[1], new[1]), tuple(state), tuple(state_)
    )
    np.testing.assert_array_equal(np.asarray(got[1], np.float32), 0)


@pytest.mark.parametrize("window", (CAPACITY, 5))
def test_attention_step_is_the_layer(window):
    layer = initialised(SoftmaxAttention(CONFIG, window, Ops()))
    # Empty, partly filled, still, about to be full, wrapped.
    token_index = [0, 3, -1, CAPACITY - 1, CAPACITY, 29]
    now = span(token_index)
    x = normal(len(token_index), 1, CONFIG.hidden_size, seed=2)
    kv_cache = KVCache(*filled(layer.state_spec(len(token_index), None, jnp.float32), seed=3))

    @nnx.jit
    def run(layer, x, kv_cache):
        q, k, v = (
            p(x).reshape(len(token_index), 1, -1, CONFIG.head_dim)
            for p in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        q, k = (rotate(y, now.cos, now.sin) for y in (q, k))
        q, k, v = (y[:, 0].at[2].set(jnp.nan) for y in (q, k, v))
        out, new = attention_step.step(
            q, k, v, kv_cache, now.token_index[:, 0], window, CONFIG.head_dim**-0.5
        )
        return layer(x, kv_cache, now), (layer.o_proj(out.reshape(len(token_index), 1, -1)), new)

    (want, want_ring), (got, new) = run(layer, x, kv_cache)
    assert rel_rms(got, want) <= 1e-6
    jax.tree.map(np.testing.assert_array_equal, tuple(want_ring), tuple(new))
    np.testing.assert_array_equal(new.k[2], kv_cache.k[2])


def test_attention_step_takes_a_window_shorter_than_the_ring():
    """What is out of the window changes nothing, whichever slot it lies in."""
    token_index = jnp.asarray([7, 20])
    q, k, v = (normal(2, 2, 8, seed=i) for i in range(3))
    kv_cache = KVCache(*(normal(2, CAPACITY, 2, 8, seed=i) for i in (3, 4)))
    old = np.asarray([[0, 1, 2, 3, 7], [i % CAPACITY for i in (12, 13, 14, 15, 16)]])
    other = KVCache(*(x.at[np.arange(2)[:, None], old].set(9.0) for x in kv_cache))
    out, _ = attention_step.step(q, k, v, kv_cache, token_index, 4, 1.0)
    same, _ = attention_step.step(q, k, v, other, token_index, 4, 1.0)
    np.testing.assert_array_equal(out, same)
    for window in (None, 100):  # no more than the ring holds
        all_, _ = attention_step.step(q, k, v, kv_cache, token_index, window, 1.0)
        np.testing.assert_array_equal(
            all_, attention_step.step(q, k, v, kv_cache, token_index, CAPACITY, 1.0)[0]
        )


def shaped(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def delta_shapes(batch, heads=16, keys=128, values=256, dtype=jnp.bfloat16):
    q, v, h = ((batch, heads * n) for n in (keys, values, 1))
    inputs = api.Inputs(*(shaped(s, dtype) for s in (q, q, v, v, h, h)))
    widths = (heads * keys, heads * keys, heads * values)
    weights = api.Weights(
        *(shaped((4, n)) for n in widths), shaped((heads,)), shaped((heads,)), shaped((values,))
    )
    recurrent_state = shaped((batch, heads, keys, values), jnp.float32)
    state = DeltaState(recurrent_state, *(shaped((batch, 3, n), dtype) for n in widths))
    return inputs, weights, state


def attention_shapes(batch, heads=16, key_heads=2, width=128, capacity=8192, dtype=jnp.bfloat16):
    kv_cache = KVCache(*[shaped((batch, capacity, key_heads, width), dtype)] * 2)
    return (
        shaped((batch, heads, width), dtype),
        *[shaped((batch, key_heads, width), dtype)] * 2,
        kv_cache,
    )


def lowered(function, *shapes, donate):
    return (
        jax.jit(function, donate_argnums=donate)
        .trace(*shapes)
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )


@pytest.mark.parametrize(("batch", "values"), [(1, 256), (64, 64)])
def test_delta_kernel_lowers_for_cuda(batch, values):
    inputs, weights, state = delta_shapes(batch, values=values)
    run = lambda *a: delta_step_hopper.step(*a, 1e-5)  # noqa: E731
    text = lowered(run, inputs, weights, state, shaped((batch,), jnp.int32), donate=2)
    assert text.count("@mosaic_gpu_v2") == 1
    assert text.count("output_operand_alias<") == 4  # the state is updated in place


@pytest.mark.parametrize(("batch", "capacity"), [(1, 8192), (64, 256)])
def test_attention_kernels_lower_for_cuda(batch, capacity):
    def run(q, k, v, kv_cache, token_index):
        return attention_step_hopper.step(q, k, v, kv_cache, token_index, capacity, 0.1)

    text = lowered(
        run, *attention_shapes(batch, capacity=capacity), shaped((batch,), jnp.int32), donate=3
    )
    assert text.count("@mosaic_gpu_v2") == 2
    assert text.count("output_operand_alias<") == 2


def test_delta_kernel_refuses_by_name():
    def reason(**changed):
        return delta_step_hopper.supports(*delta_shapes(2, **changed))

    assert reason() is None
    assert "64 wide" in reason(keys=64)
    assert "80 wide" in reason(values=80)
    assert "512 wide" in reason(values=512)
    assert "bfloat16" in reason(dtype=jnp.float32)
    inputs, weights, state = delta_shapes(2)
    assert "float32 only" in delta_step_hopper.supports(
        inputs, weights, state._replace(recurrent_state=shaped((2, 16, 128, 256)))
    )
    wide = weights._replace(q_conv=shaped((3, 2048)))
    assert "3 taps" in delta_step_hopper.supports(inputs, wide, state)
    with pytest.raises(ValueError, match="use the implementation xla"):
        delta_step_hopper.step(*delta_shapes(2, keys=64), shaped((2,), jnp.int32), 1e-5)


def test_attention_kernel_refuses_by_name():
    def reason(window=8192, scale=1.0, **changed):
        return attention_step_hopper.supports(
            *attention_shapes(2, **changed), window=window, scale=scale
        )

    assert reason() is None
    assert "bfloat16" in reason(dtype=jnp.float32)
    assert "64" in reason(width=64)
    assert "a multiple of 8 on each" in reason(heads=8)
    assert "8191 slots" in reason(capacity=8191, window=8191)
    assert reason(window=None) is None
    assert "positive" in reason(scale=0.0)
    with pytest.raises(ValueError, match="use the implementation xla"):
        attention_step_hopper.step(
            *attention_shapes(2, width=64), shaped((2,), jnp.int32), 8192, 1.0
        )
