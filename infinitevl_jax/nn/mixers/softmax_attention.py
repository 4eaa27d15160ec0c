"""Softmax attention, full or sliding-window, with a ring-buffer key/value cache."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from infinitevl_jax.config.model import FULL, SLIDING, TextConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.fused import Joint
from infinitevl_jax.nn.layers import Linear, RMSNorm
from infinitevl_jax.nn.mixers.mixer import Mixer
from infinitevl_jax.nn.mixers.registry import register_mixer
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.rope import rotate
from infinitevl_jax.nn.token_info import TokenInfo
from infinitevl_jax.sharding import constrain
from pallas_kernels.attention import KVCache, Mask, held_tokens, merge, write


class SoftmaxAttention(Mixer):
    """Grouped-query attention with rotary embedding; q, k, v have biases.

    A query sees keys fewer than `window` tokens back (None: all) and the first `sinks` of its
    sequence. Options of the configuration: `query_key_norm` normalises each query and key head;
    `attention_output_gate` multiplies each output head by the sigmoid of a gate that q_proj
    computes.
    """

    first_joint = "qkv_proj"
    qkv_proj = Joint("q_proj", "k_proj", "v_proj")

    def __init__(self, config: TextConfig, window: int | None, ops: Ops, sinks: int = 0):
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.window, self.sinks = config.head_dim, window, sinks
        self.ops = ops
        self.gated = config.attention_output_gate
        width = config.hidden_size

        def project(heads):
            features = heads * self.head_dim
            return Linear(width, features, ("width", "heads"), bias=True)

        self.q_proj = project(self.heads * (2 if self.gated else 1))
        self.k_proj, self.v_proj = project(self.kv_heads), project(self.kv_heads)
        self.o_proj = Linear(self.heads * self.head_dim, width, ("heads", "width"))
        normed = config.query_key_norm
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if normed else None

    def state_spec(self, batch: int, max_length: int | None, dtype) -> KVCache:
        """min(sinks + window, max_length) slots."""
        most = None if self.window is None else self.sinks + self.window
        bounds = [bound for bound in (most, max_length) if bound is not None]
        if not bounds:
            raise InfiniteVLError("full attention keeps every token", "pass max_length in tokens")
        shape = (batch, min(bounds), self.kv_heads, self.head_dim)
        return KVCache(*[jax.ShapeDtypeStruct(shape, dtype)] * 2)

    def max_length(self, state: KVCache) -> int | None:
        return state.k.shape[1] if self.window is None else None

    def __call__(
        self, x: Array, state: KVCache | None, info: TokenInfo
    ) -> tuple[Array, KVCache | None]:
        q, k, v, gate = self.project(x, info)
        scale, window, sinks = self.head_dim**-0.5, self.window, self.sinks
        tokens = info.token_index, info.token_index, info.segment_ids, info.segment_ids
        mask = Mask(window=window, sinks=sinks, aligned=True)
        out, lse = self.ops.attention(q, k, v, *tokens, mask=mask, scale=scale)
        if state is not None:

            def with_cache():
                held = held_tokens(info.length, state.k.shape[1], sinks)
                mask = Mask(window=window, sinks=sinks)
                tokens = info.token_index, held
                cached = self.ops.attention(q, state.k, state.v, *tokens, mask=mask, scale=scale)
                return merge(out, lse, *cached)[0]

            if not info.fresh:
                # Skip an empty cache (first chunk of a prompt). Not on a GPU, where XLA would ask
                # the host which branch to take, and the device would wait for it in each layer. The
                # kernel for Hopper finds nothing to read; xla computes as for a full cache.
                some = jax.lax.platform_dependent(
                    jnp.any(info.length > 0), cuda=jnp.ones_like, default=lambda some: some
                )
                out = jax.lax.cond(some, with_cache, lambda: out)
            state = write(state, k, v, info.token_index, sinks)
        return self.o_proj(self._gated(out, gate)), state

    def step(
        self,
        x: Array,
        norm: RMSNorm,
        state: KVCache,
        info: TokenInfo,
        prefetch: Array | None = None,
    ) -> tuple[Array, KVCache]:
        """Attention over cache and token, and the write into the cache, are one operator."""
        projected = self.qkv_proj.step(self.ops, x, norm, prefetch=self.o_proj.kernel[...])
        q, k, v, gate = self._heads(*projected, info)
        token = q[:, 0], k[:, 0], v[:, 0]
        out, state = self.ops.attention_step(
            *token, state, info.token_index[:, 0], self.window, self.head_dim**-0.5, self.sinks
        )
        out = self._gated(out[:, None], gate)
        return self.o_proj.step(self.ops, out, residual=x, prefetch=prefetch), state

    def project(self, x: Array, info: TokenInfo) -> tuple[Array, Array, Array, Array | None]:
        """q, k (both rotated) and v [batch, length, heads, head_dim], and the output gate
        [batch, length, heads * head_dim] if there is one."""
        return self._heads(*self.qkv_proj(x), info)

    def _heads(
        self, q: Array, k: Array, v: Array, info: TokenInfo
    ) -> tuple[Array, Array, Array, Array | None]:
        """The same from the projections [batch, length, channels]."""

        def heads(y):
            y = rearrange(y, "b t (h d) -> b t h d", d=self.head_dim)
            return constrain(y, "batch", "length", "heads", None)

        gate = None
        if self.gated:
            q = rearrange(q, "b t (h two d) -> two b t (h d)", two=2, d=self.head_dim)
            q, gate = q[0], q[1]
        q, k, v = heads(q), heads(k), heads(v)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, info.cos, info.sin), rotate(k, info.cos, info.sin), v, gate

    @staticmethod
    def _gated(out: Array, gate: Array | None) -> Array:
        """[batch, length, heads, head_dim] -> [batch, length, heads * head_dim]."""
        out = rearrange(out, "b t h d -> b t (h d)")
        return out if gate is None else out * jax.nn.sigmoid(gate)


def window_attention(config: TextConfig, ops: Ops) -> SoftmaxAttention:
    """Attention over the first `num_attention_sinks` and the last `sliding_window` keys."""
    return SoftmaxAttention(config, config.sliding_window, ops, config.num_attention_sinks)


def full_attention(config: TextConfig, ops: Ops) -> SoftmaxAttention:
    """Attention over all keys."""
    return SoftmaxAttention(config, None, ops)


register_mixer(SLIDING, window_attention, title="window attention", group="softmax mixers")
register_mixer(FULL, full_attention, title="full attention", group="softmax mixers")
