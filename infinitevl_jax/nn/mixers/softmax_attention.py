"""Softmax attention with a retention rule: which keys stay in reach, and how many slots their cache
needs.

One mixer is every softmax layer of the family: full attention keeps everything, InfiniteVL's
  sliding window the last `window` keys.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from infinitevl_jax.config.model import TextConfig
from infinitevl_jax.nn.layers import Linear
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.rngs import Rngs
from infinitevl_jax.nn.rope import rotate
from infinitevl_jax.nn.token_info import TokenInfo
from infinitevl_jax.sharding import constrain
from pallas_kernels.attention import KVCache, Mask, merge


@dataclass(frozen=True)
class Retention:
    """A query sees keys fewer than `window` tokens back (None: all); a cache of `capacity` slots
    holds them as a ring."""

    window: int | None

    def capacity(self, max_length: int | None) -> int:
        """Slots needed for sequences of up to `max_length` tokens (None: any number, for windows
        only). The window caps them."""
        if self.window is None or max_length is None:
            return self.window or max_length
        return min(self.window, max_length)


def slot_index(length: Array, capacity: int) -> Array:
    """[batch] tokens seen -> [batch, capacity] ordinal of the token in each slot, -1 where the slot
    is empty."""
    last = length[:, None] - 1
    held = last - (last - jnp.arange(capacity)) % capacity
    return jnp.where((held >= 0) & (last >= 0), held, -1)


def write(kv_cache: KVCache, k: Array, v: Array, index: Array) -> KVCache:
    """Put new tokens in their slots. Pads, and tokens that this same call already pushes out of the
    ring, are dropped."""
    capacity = kv_cache.k.shape[1]
    newest = jnp.max(index, axis=1, keepdims=True)
    slot = jnp.where(
        (index >= 0) & (index > newest - capacity), index % capacity, capacity
    )  # capacity = out of range = dropped
    put = jax.vmap(lambda old, slot, new: old.at[slot].set(new, mode="drop", unique_indices=False))
    return KVCache(
        put(kv_cache.k, slot, k.astype(kv_cache.k.dtype)),
        put(kv_cache.v, slot, v.astype(kv_cache.v.dtype)),
    )


class SoftmaxAttention(nnx.Module):
    """Grouped-query attention with M-RoPE: q, k, v with bias, o without."""

    def __init__(self, config: TextConfig, retention: Retention, ops: Ops, rngs: Rngs):
        self.head_dim, self.kv_heads, self.heads = (
            config.head_dim,
            config.num_key_value_heads,
            config.num_attention_heads,
        )
        self.retention, self.ops = retention, ops
        width = config.hidden_size
        self.q_proj = Linear(width, self.heads * self.head_dim, bias=True, rngs=rngs)
        self.k_proj = Linear(width, self.kv_heads * self.head_dim, bias=True, rngs=rngs)
        self.v_proj = Linear(width, self.kv_heads * self.head_dim, bias=True, rngs=rngs)
        self.o_proj = Linear(self.heads * self.head_dim, width, rngs=rngs)

    def state_spec(self, batch: int, max_length: int | None, dtype) -> KVCache:
        """Shapes and dtypes of this layer's cache."""
        shape = (batch, self.retention.capacity(max_length), self.kv_heads, self.head_dim)
        return KVCache(*[jax.ShapeDtypeStruct(shape, dtype)] * 2)

    def __call__(
        self, x: Array, state: KVCache | None, info: TokenInfo
    ) -> tuple[Array, KVCache | None]:
        """x [batch, length, width] -> the same shape, and the new state (None in training)."""

        def heads(y):
            return constrain(
                rearrange(y, "b t (h d) -> b t h d", d=self.head_dim),
                "batch",
                "length",
                "heads",
                None,
            )

        q = rotate(heads(self.q_proj(x)), info.cos, info.sin)
        k = rotate(heads(self.k_proj(x)), info.cos, info.sin)
        v = heads(self.v_proj(x))
        scale = self.head_dim**-0.5
        window = self.retention.window
        tokens = info.token_index, info.token_index, info.segment_ids, info.segment_ids
        out, lse = self.ops.attention(
            q, k, v, *tokens, mask=Mask(window=window, aligned=True), scale=scale
        )
        if state is not None:

            def with_cache():
                held = slot_index(info.length, state.k.shape[1])
                cached = self.ops.attention(
                    q,
                    state.k,
                    state.v,
                    info.token_index,
                    held,
                    mask=Mask(window=window),
                    scale=scale,
                )
                return merge(out, lse, *cached)[0]

            # an empty cache (the first chunk of a prompt) is not worth reading; a single token
            # nearly always has a past
            out = (
                with_cache()
                if x.shape[1] == 1
                else jax.lax.cond(jnp.any(info.length > 0), with_cache, lambda: out)
            )
            state = write(state, k, v, info.token_index)
        return self.o_proj(rearrange(out, "b t h d -> b t (h d)")), state
