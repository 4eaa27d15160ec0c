"""What attention keeps of each sequence between calls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class KVCache(NamedTuple):
    """Keys (after rotary embedding) and values of the first tokens, the sinks, and of the last.

    Token i < sinks is in slot i for good. The other tokens share the slots after the sinks as a
    ring. A cache with no more slots than sinks has room for whole sequences only.
    """

    k: Array  # [batch, capacity, kv_heads, head_dim]
    v: Array


def slot_of(token_index: Array, capacity: int, sinks: int = 0) -> Array:
    """The slot of a token, of token_index >= 0."""
    sinks = min(sinks, capacity - 1)
    in_ring = sinks + (token_index - sinks) % (capacity - sinks)
    return jnp.where(token_index < sinks, token_index, in_ring)


def held_tokens(length: Array, capacity: int, sinks: int = 0) -> Array:
    """Index of the token that each slot holds.

    Args:
        length: [batch] tokens seen.

    Returns:
        [batch, capacity] int32; -1 is an empty slot.
    """
    sinks = min(sinks, capacity - 1)
    slot, last = jnp.arange(capacity), length[:, None] - 1
    in_ring = last - (last - slot) % (capacity - sinks)  # the newest that belongs into the slot
    held = jnp.where(slot < sinks, slot, in_ring)
    lowest = jnp.where(slot < sinks, 0, sinks)
    return jnp.where((held >= lowest) & (held <= last), held, -1)


def write(kv_cache: KVCache, k: Array, v: Array, token_index: Array, sinks: int = 0) -> KVCache:
    """The cache with new tokens in their slots.

    Args:
        k, v: [batch, length, kv_heads, head_dim].
        token_index: [batch, length]; -1 marks a pad. Pads are dropped, as are tokens that later
            ones of the same call overwrite.
    """
    capacity = kv_cache.k.shape[1]
    newest = jnp.max(token_index, axis=1, keepdims=True)
    stays = (token_index > newest - (capacity - min(sinks, capacity - 1))) | (token_index < sinks)
    slot = jnp.where(
        (token_index >= 0) & stays, slot_of(token_index, capacity, sinks), capacity
    )  # capacity = out of range = dropped
    put = jax.vmap(lambda old, slot, new: old.at[slot].set(new, mode="drop", unique_indices=False))
    return KVCache(
        *(put(old, slot, new.astype(old.dtype)) for old, new in zip(kv_cache, (k, v), strict=True))
    )
