"""One token of a Gated DeltaNet layer between its projections: the definition, and the portable implementation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Inputs(NamedTuple):
    """What the layer's projections make of one token of each sequence, all of one dtype."""

    q: Array  # [batch, heads * K] before the convolution, as k and v are
    k: Array
    v: Array  # [batch, heads * V]
    gate: Array  # [batch, heads * V]
    a: Array  # [batch, heads] step size before softplus
    b: Array  # [batch, heads] write strength before sigmoid


class Weights(NamedTuple):
    """The layer's own parameters, of any floating dtype."""

    q_conv: Array  # [4, heads * K]; row 3 meets the current token
    k_conv: Array
    v_conv: Array  # [4, heads * V]
    A_log: Array  # [heads]
    dt_bias: Array  # [heads]
    norm: Array  # [V] shared by the heads


class State(NamedTuple):
    """What the layer remembers of each sequence."""

    memory: Array  # [batch, heads, K, V] float32
    q_tail: Array  # [batch, 3, heads * K] the last three inputs of the convolutions, oldest first
    k_tail: Array
    v_tail: Array  # [batch, 3, heads * V]


def step(inputs: Inputs, weights: Weights, state: State, index: Array, eps: float) -> tuple[Array, State]:
    """Take in one token of each sequence.

        q, k, v = silu(conv(tail and new input));  q = q / sqrt(sum q^2 + 1e-6) * K^-0.5;  k likewise, unscaled
        S = exp(g) S;  u = sigmoid(b) (v - k^T S);  S = S + k u^T;  o = q^T S     g = -exp(A_log) softplus(a + dt_bias)
        out = o / sqrt(mean o^2 + eps) * norm * silu(gate)

    Args:
        index: [batch] int, the token's ordinal in its sequence; -1 for a sequence that stands still.
        eps: of the norm.

    Returns:
        out [batch, heads * V] in the inputs' dtype, and the new state. Where index is -1, out is 0 and the state comes
        back bit for bit, whatever the inputs hold.

    Arithmetic is float32 or wider; here values are rounded to the inputs' dtype where separate operations would hand them
    on: after the convolutions, the normalisation of q and k, and the delta rule. Other implementations may do without.
    """
    batch, heads, width, _ = state.memory.shape
    dtype, wide = inputs.q.dtype, jnp.promote_types(inputs.q.dtype, jnp.float32)
    real = index >= 0

    def convolve(x, weight, tail):
        seen = jnp.concatenate([tail, x[:, None]], axis=1)  # [batch, 4, channels]
        y = jax.nn.silu(jnp.sum(seen.astype(wide) * weight.astype(wide), axis=1)).astype(dtype)
        return y.reshape(batch, heads, -1).astype(wide), jnp.where(real[:, None, None], seen[:, 1:], tail)

    def unit(x, scale):
        return (x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6) * scale).astype(dtype).astype(wide)

    q, q_tail = convolve(inputs.q, weights.q_conv, state.q_tail)
    k, k_tail = convolve(inputs.k, weights.k_conv, state.k_tail)
    v, v_tail = convolve(inputs.v, weights.v_conv, state.v_tail)
    q, k = unit(q, width**-0.5), unit(k, 1.0)  # [batch, heads, K]

    a, b, rate, bias = (x.astype(wide) for x in (inputs.a, inputs.b, weights.A_log, weights.dt_bias))
    decay = jnp.exp(-jnp.exp(rate) * jax.nn.softplus(a + bias))[..., None]  # [batch, heads, 1]
    memory = state.memory
    update = jax.nn.sigmoid(b)[..., None] * (v - decay * jnp.sum(k[..., None] * memory, axis=2))  # [batch, heads, V]
    out = decay * jnp.sum(q[..., None] * memory, axis=2) + jnp.sum(q * k, axis=-1, keepdims=True) * update
    memory = decay[..., None] * memory + k[..., None] * update[:, :, None]

    out = out.astype(dtype).astype(wide)
    out = out * jax.lax.rsqrt(jnp.mean(out * out, -1, keepdims=True) + eps) * weights.norm.astype(wide)
    out = out.reshape(batch, -1) * jax.nn.silu(inputs.gate.astype(wide))
    out = jnp.where(real[:, None], out.astype(dtype), 0)
    memory = jnp.where(real[:, None, None, None], memory, state.memory)
    return out, State(memory, q_tail, k_tail, v_tail)
