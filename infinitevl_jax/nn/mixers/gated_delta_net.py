"""The Gated DeltaNet mixer.

Short causal convolutions, per-head decay and write strength, the gated delta rule, a gated norm.
There are no biases and no positional encoding. The recurrent state [head_dim, value_dim] of a head
is float32 for any activation dtype.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from infinitevl_jax.config.model import LINEAR, TextConfig
from infinitevl_jax.nn.fused import Joint
from infinitevl_jax.nn.initializers import ones
from infinitevl_jax.nn.layers import Linear, RMSNorm
from infinitevl_jax.nn.mixers.mixer import Mixer
from infinitevl_jax.nn.mixers.registry import register_mixer
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.parameter import parameter
from infinitevl_jax.nn.token_info import TokenInfo
from infinitevl_jax.sharding import constrain
from pallas_kernels.columns import Columns, values
from pallas_kernels.gated_delta_rule import DeltaState
from pallas_kernels.gated_delta_rule.api import Inputs, Weights


def last_tap(key: Array, shape: tuple[int, ...]) -> Array:
    """A convolution [taps, channels] that returns the current token."""
    return jnp.zeros(shape).at[-1].set(1.0)


def step_sizes(key: Array, shape: tuple[int, ...]) -> Array:
    """Inverse softplus of step sizes 1e-3..0.1, log-uniform."""
    low, high = jnp.log(1e-3), jnp.log(0.1)
    step = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
    return step + jnp.log(-jnp.expm1(-step))


def decay_rates(key: Array, shape: tuple[int, ...]) -> Array:
    """Logarithm of rates 1..16, uniform."""
    return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))


class CausalConv(nnx.Module):
    """Depthwise causal convolution, then SiLU.

    The weight is [taps, channels]; the last tap multiplies the current token.
    """

    def __init__(self, channels: int, taps: int, ops: Ops):
        self.ops = ops
        self.weight = parameter(
            (taps, channels),
            last_tap,
            (None, "heads"),
            torch_shape=(channels, 1, taps),
            transposed=True,
        )

    def __call__(
        self, x: Array | Columns, conv_state: Array | None, info: TokenInfo
    ) -> tuple[Array, Array]:
        tokens = info.token_index, info.segment_ids
        return self.ops.short_conv(x, self.weight[...], conv_state, *tokens)


class GatedNorm(nnx.Module):
    """Per-head RMSNorm times silu(gate), in float32. The heads share the weight [value_dim]."""

    def __init__(self, features: int, heads: int, eps: float, ops: Ops):
        self.heads, self.eps, self.ops = heads, eps, ops
        self.weight = parameter((features,), ones, (None,), decay=False)

    def __call__(self, x: Array, gate: Array) -> Array:
        """x, gate [batch, length, heads * value_dim] -> the same shape."""
        width = len(self.weight[...])
        normed = self.ops.l2norm(x, self.heads, width * self.eps) * width**0.5
        weight = jnp.tile(self.weight[...].astype(jnp.float32), self.heads)
        return (normed * weight * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


class GatedDeltaNet(Mixer):
    """Linear attention with the gated delta rule.

    Projections: q, k, v, a (decay), b (write strength), g (output gate), o. q, k and v pass through
    a convolution each. With fewer key heads than value heads, each key head serves a group of value
    heads.
    """

    first_joint = "input_proj"
    # The narrow ones come last, so that the others begin where kernels can read them in place.
    input_proj = Joint("q_proj", "k_proj", "v_proj", "g_proj", "b_proj", "a_proj")

    def __init__(self, config: TextConfig, ops: Ops):
        self.heads, self.key_heads = config.num_linear_heads, config.linear_key_heads
        self.head_dim, self.value_dim = config.linear_head_dim, config.linear_value_dim
        self.taps, self.ops = config.conv_size, ops
        width = config.hidden_size
        self.key_width, self.value_width = (
            self.key_heads * self.head_dim,
            self.heads * self.value_dim,
        )

        def project(features):
            return Linear(width, features, ("width", "heads"))

        self.q_proj, self.k_proj = project(self.key_width), project(self.key_width)
        self.v_proj = project(self.value_width)
        self.a_proj, self.b_proj = project(self.heads), project(self.heads)
        self.g_proj = project(self.value_width)
        self.o_proj = Linear(self.value_width, width, ("heads", "width"))
        self.q_conv1d = CausalConv(self.key_width, self.taps, ops)
        self.k_conv1d = CausalConv(self.key_width, self.taps, ops)
        self.v_conv1d = CausalConv(self.value_width, self.taps, ops)
        # heads start with time constants from ten to thousands of tokens
        self.dt_bias = parameter((self.heads,), step_sizes, ("heads",), decay=False)
        self.A_log = parameter((self.heads,), decay_rates, ("heads",), decay=False)
        self.o_norm = GatedNorm(self.value_dim, self.heads, config.norm_eps, ops)

    def state_spec(self, batch: int, max_length: int | None, dtype) -> DeltaState:
        """The size does not depend on `max_length`."""
        inputs = [
            jax.ShapeDtypeStruct((batch, self.taps - 1, channels), dtype)
            for channels in (self.key_width, self.key_width, self.value_width)
        ]
        shape = (batch, self.heads, self.head_dim, self.value_dim)
        return DeltaState(jax.ShapeDtypeStruct(shape, jnp.float32), *inputs)

    def __call__(
        self, x: Array, state: DeltaState | None, info: TokenInfo
    ) -> tuple[Array, DeltaState | None]:
        out, state = self.before_output(x, state, info)
        return self.o_proj(out), state

    def before_output(
        self, x: Array, state: DeltaState | None, info: TokenInfo
    ) -> tuple[Array, DeltaState | None]:
        """What the output projection takes, [batch, length, heads * value_dim]."""
        past = state or DeltaState(None, None, None, None)

        def heads(y, count):
            y = rearrange(y, "b t (h d) -> b t h d", h=count)
            return constrain(y, "batch", "length", "heads", None)

        q, k, v, *others = self.input_proj.apart(x)
        gate, b, a = values(others)
        q, q_conv_state = self.q_conv1d(q, past.q_conv_state, info)
        k, k_conv_state = self.k_conv1d(k, past.k_conv_state, info)
        v, v_conv_state = self.v_conv1d(v, past.v_conv_state, info)
        # XLA for GPU would fuse the norms with the convolutions, and store their shifted inputs.
        q, k = jax.lax.optimization_barrier((q, k))
        q = (self.ops.l2norm(q, self.key_heads, 1e-6) * self.head_dim**-0.5).astype(x.dtype)
        k = self.ops.l2norm(k, self.key_heads, 1e-6).astype(x.dtype)

        beta = jax.nn.sigmoid(b.astype(jnp.float32))  # [batch, length, heads]
        rate = jnp.exp(self.A_log[...].astype(jnp.float32))
        g = -rate * jax.nn.softplus(a.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        out, recurrent_state = self.ops.gated_delta_rule(
            heads(q, self.key_heads),
            heads(k, self.key_heads),
            heads(v, self.heads),
            g,
            beta,
            past.recurrent_state,
            info.token_index,
            info.segment_ids,
        )
        out = self.o_norm(rearrange(out, "b t h d -> b t (h d)"), gate)
        if state is not None:
            state = DeltaState(recurrent_state, q_conv_state, k_conv_state, v_conv_state)
        return out, state

    def step(
        self,
        x: Array,
        norm: RMSNorm,
        state: DeltaState,
        info: TokenInfo,
        prefetch: Array | None = None,
    ) -> tuple[Array, DeltaState]:
        """All between the projections is one operator."""
        following = self.o_proj.kernel[...]
        q, k, v, gate, b, a = self.input_proj.columns(self.ops, x, norm, following)
        inputs = Inputs(q, k, v, gate, a, b)
        convolutions = (conv.weight[...] for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d))
        gates = self.A_log[...], self.dt_bias[...]
        weights = Weights(*convolutions, *gates, self.o_norm.weight[...])
        out, state = self.ops.gated_delta_rule_step(
            inputs, weights, state, info.token_index[:, 0], self.o_norm.eps
        )
        return self.o_proj.step(self.ops, out[:, None], residual=x, prefetch=prefetch), state


register_mixer(LINEAR, GatedDeltaNet, title="Gated DeltaNet")
