"""The one-token step of a Gated DeltaNet layer between its projections: the definition, which is
also the portable implementation."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.columns import values
from pallas_kernels.gated_delta_rule.api import Inputs, Weights, repeat_key_heads
from pallas_kernels.gated_delta_rule.state import DeltaState


def step(
    inputs: Inputs, weights: Weights, state: DeltaState, token_index: Array, eps: float
) -> tuple[Array, DeltaState]:
    """Process one token of each sequence.

        q, k, v = silu(conv(conv_state and new input))
        q = q / sqrt(sum q^2 + 1e-6) * K^-0.5;  k likewise, unscaled
        S = exp(g) S;  u = sigmoid(b) (v - k^T S);  S = S + k u^T;  o = q^T S
        g = -exp(A_log) softplus(a + dt_bias)
        out = o / sqrt(mean o^2 + eps) * norm * silu(gate)

    Args:
        inputs: the layer's projections of the token.
        weights: the layer's own parameters.
        state: the layer's state before the token.
        token_index: [batch] int, the token's place in its sequence; -1 for a sequence without a new
            token.
        eps: of the norm.

    Returns:
        out [batch, value_heads * V] in the inputs' dtype, and the new state. Where token_index is
        -1, out is 0 and the state is returned bit for bit, whatever the inputs hold.

    Arithmetic is float32 or wider. Values are rounded to the inputs' dtype where separate
    operations would round them: after the convolutions, the normalisation of q and k, and the delta
    rule. Other implementations may skip these roundings.
    """
    inputs = values(inputs)
    batch, heads, width, _ = state.recurrent_state.shape
    dtype, wide = inputs.q.dtype, jnp.promote_types(inputs.q.dtype, jnp.float32)
    real = token_index >= 0

    def convolve(x, weight, conv_state):
        # Otherwise XLA for GPU computes the projection that made x inside the concatenation.
        x = jax.lax.optimization_barrier(x)
        seen = jnp.concatenate([conv_state, x[:, None]], axis=1)  # [batch, 4, channels]
        y = jax.nn.silu(jnp.sum(seen.astype(wide) * weight.astype(wide), axis=1)).astype(dtype)
        return y.astype(wide), jnp.where(real[:, None, None], seen[:, 1:], conv_state)

    def unit(x, scale):
        return (
            (x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6) * scale)
            .astype(dtype)
            .astype(wide)
        )

    q, q_conv_state = convolve(inputs.q, weights.q_conv, state.q_conv_state)
    k, k_conv_state = convolve(inputs.k, weights.k_conv, state.k_conv_state)
    v, v_conv_state = convolve(inputs.v, weights.v_conv, state.v_conv_state)
    q, k = (x.reshape(batch, -1, width) for x in (q, k))  # [batch, key heads, K]
    q, k = (repeat_key_heads(x, heads, axis=1) for x in (unit(q, width**-0.5), unit(k, 1.0)))
    v = v.reshape(batch, heads, -1)

    a, b, rate, bias = (
        x.astype(wide) for x in (inputs.a, inputs.b, weights.A_log, weights.dt_bias)
    )
    decay = jnp.exp(-jnp.exp(rate) * jax.nn.softplus(a + bias))[..., None]  # [batch, heads, 1]
    recurrent_state = state.recurrent_state

    def read(x):  # [batch, heads, V]
        return jnp.einsum("bhk,bhkv->bhv", x, recurrent_state, precision="highest")

    update = jax.nn.sigmoid(b)[..., None] * (v - decay * read(k))
    out = decay * read(q) + jnp.sum(q * k, axis=-1, keepdims=True) * update
    recurrent_state = decay[..., None] * recurrent_state + k[..., None] * update[:, :, None]

    out = out.astype(dtype).astype(wide)
    out = (
        out
        * jax.lax.rsqrt(jnp.mean(out * out, -1, keepdims=True) + eps)
        * weights.norm.astype(wide)
    )
    out = out.reshape(batch, -1) * jax.nn.silu(inputs.gate.astype(wide))
    out = jnp.where(real[:, None], out.astype(dtype), 0)
    recurrent_state = jnp.where(real[:, None, None, None], recurrent_state, state.recurrent_state)
    return out, DeltaState(recurrent_state, q_conv_state, k_conv_state, v_conv_state)
