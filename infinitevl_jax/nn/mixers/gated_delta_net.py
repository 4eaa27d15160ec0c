"""The Gated DeltaNet mixer: short causal convolutions, per-head decay and write strength, the gated
delta rule, a gated norm.

No biases and no positional encoding. The state of a head, [head_dim, value_dim], stays f32 whatever
the activations are.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from infinitevl_jax.config.model import TextConfig
from infinitevl_jax.nn.layers import Linear
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.rngs import Rngs
from infinitevl_jax.nn.token_info import TokenInfo
from infinitevl_jax.sharding import constrain
from pallas_kernels.gated_delta_rule import DeltaState


class CausalConv(nnx.Module):
    """Depthwise causal convolution followed by SiLU; weight [taps, channels], the last tap is the
    current token."""

    def __init__(self, channels: int, taps: int, ops: Ops):
        self.ops = ops
        self.weight = nnx.Param(jnp.zeros((taps, channels)).at[-1].set(1.0))

    def __call__(self, x: Array, conv_state: Array | None, info: TokenInfo) -> tuple[Array, Array]:
        return self.ops.short_conv(
            x, self.weight[...], conv_state, info.token_index, info.segment_ids
        )


class GatedNorm(nnx.Module):
    """RMSNorm over a head's values in f32, times weight, times silu(gate); weight [value_dim] is
    shared by the heads."""

    def __init__(self, features: int, heads: int, eps: float, ops: Ops):
        self.heads, self.eps, self.ops = heads, eps, ops
        self.weight = nnx.Param(jnp.ones(features))

    def __call__(self, x: Array, gate: Array) -> Array:
        """x, gate [batch, length, heads * value_dim] -> the same shape."""
        width = len(self.weight[...])
        normed = self.ops.l2norm(x, self.heads, width * self.eps) * width**0.5
        weight = jnp.tile(self.weight[...].astype(jnp.float32), self.heads)
        return (normed * weight * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


class GatedDeltaNet(nnx.Module):
    """Linear attention with a gated delta rule (infinitevl.md's tensors: q, k, v, a, b, g, o
    projections, three convolutions)."""

    def __init__(self, config: TextConfig, ops: Ops, rngs: Rngs):
        self.heads, self.head_dim, self.value_dim = (
            config.num_linear_heads,
            config.linear_head_dim,
            config.linear_value_dim,
        )
        self.taps, self.ops = config.conv_size, ops
        width, key_width, value_width = (
            config.hidden_size,
            self.heads * self.head_dim,
            self.heads * self.value_dim,
        )
        self.q_proj = Linear(width, key_width, rngs=rngs)
        self.k_proj = Linear(width, key_width, rngs=rngs)
        self.v_proj = Linear(width, value_width, rngs=rngs)
        self.a_proj = Linear(width, self.heads, rngs=rngs)
        self.b_proj = Linear(width, self.heads, rngs=rngs)
        self.g_proj = Linear(width, value_width, rngs=rngs)
        self.o_proj = Linear(value_width, width, rngs=rngs)
        self.q_conv1d = CausalConv(key_width, self.taps, ops)
        self.k_conv1d = CausalConv(key_width, self.taps, ops)
        self.v_conv1d = CausalConv(value_width, self.taps, ops)
        # decay rates 1..16 and step sizes 1e-3..0.1, log-uniform: heads start with memories from
        # ten to thousands of tokens
        step = jnp.exp(
            jax.random.uniform(rngs(), (self.heads,), minval=jnp.log(1e-3), maxval=jnp.log(0.1))
        )
        self.A_log = nnx.Param(
            jnp.log(jax.random.uniform(rngs(), (self.heads,), minval=1.0, maxval=16.0))
        )
        self.dt_bias = nnx.Param(step + jnp.log(-jnp.expm1(-step)))  # inverse softplus
        self.o_norm = GatedNorm(self.value_dim, self.heads, config.norm_eps, ops)

    def state_spec(self, batch: int, max_length: int | None, dtype) -> DeltaState:
        """Shapes and dtypes of this layer's cache: the same for any length."""
        keys, values = self.heads * self.head_dim, self.heads * self.value_dim
        tail = [
            jax.ShapeDtypeStruct((batch, self.taps - 1, channels), dtype)
            for channels in (keys, keys, values)
        ]
        return DeltaState(
            jax.ShapeDtypeStruct((batch, self.heads, self.head_dim, self.value_dim), jnp.float32),
            *tail,
        )

    def __call__(
        self, x: Array, state: DeltaState | None, info: TokenInfo
    ) -> tuple[Array, DeltaState | None]:
        """x [batch, length, width] -> the same shape, and the new state (None in training)."""
        past = state or DeltaState(None, None, None, None)

        def heads(y):
            return constrain(
                rearrange(y, "b t (h d) -> b t h d", h=self.heads), "batch", "length", "heads", None
            )

        q, q_conv_state = self.q_conv1d(self.q_proj(x), past.q_conv_state, info)
        k, k_conv_state = self.k_conv1d(self.k_proj(x), past.k_conv_state, info)
        v, v_conv_state = self.v_conv1d(self.v_proj(x), past.v_conv_state, info)
        q = (self.ops.l2norm(q, self.heads, 1e-6) * self.head_dim**-0.5).astype(x.dtype)
        k = self.ops.l2norm(k, self.heads, 1e-6).astype(x.dtype)

        beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))  # [batch, length, heads]
        rate = jnp.exp(self.A_log[...].astype(jnp.float32))
        g = -rate * jax.nn.softplus(
            self.a_proj(x).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)
        )
        out, recurrent_state = self.ops.gated_delta_rule(
            heads(q),
            heads(k),
            heads(v),
            g,
            beta,
            past.recurrent_state,
            info.token_index,
            info.segment_ids,
        )

        out = self.o_norm(rearrange(out, "b t h d -> b t (h d)"), self.g_proj(x))
        return self.o_proj(out), None if state is None else DeltaState(
            recurrent_state, q_conv_state, k_conv_state, v_conv_state
        )
