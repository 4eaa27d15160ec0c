"""The one-token step of attention: the definition, which is also the portable implementation."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.state import KVCache, held_tokens, slot_of


def step(
    q: Array,
    k: Array,
    v: Array,
    kv_cache: KVCache,
    token_index: Array,
    window: int | None = None,
    scale: float | None = None,
    sinks: int = 0,
) -> tuple[Array, KVCache]:
    """out = softmax(scale q k^T) v over the first `sinks` and the last `window` tokens, the new one
    included. Adds the new token to the cache.

    Args:
        q: [batch, query_heads, D]. Query head h reads key head h // (query_heads / kv_heads).
        k: [batch, kv_heads, D] of the new token.
        v: [batch, kv_heads, D] of the new token.
        kv_cache: the tokens before it. Empty slots hold any finite numbers.
        token_index: [batch] int, the number of tokens before the new one. -1: a sequence without a
            new token.
        window: tokens that the new one sees, itself included. None, or more than the cache's
            capacity: all that the cache holds once the new token has replaced the oldest.
        scale: factor of the scores. None: D ** -0.5.
        sinks: first tokens of a sequence that stay in the cache.

    Returns:
        out [batch, query_heads, D] in q's dtype, and the cache with the new token in place of the
        oldest that is no sink. Where token_index is -1, out is 0 and the cache is returned bit for
        bit, whatever q, k and v hold.
    """
    scale = q.shape[2] ** -0.5 if scale is None else scale
    batch, capacity, key_heads, width = kv_cache.k.shape
    ring = capacity - min(sinks, capacity - 1)
    window = min(window or ring, ring)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    precise = {
        "preferred_element_type": wide,
        "precision": "highest" if q.dtype.itemsize >= 4 else None,
    }
    real = token_index >= 0
    held = held_tokens(token_index, capacity, sinks)  # [batch, capacity]
    near = (token_index[:, None] - held < window) | (held < sinks)
    seen = real[:, None] & (held >= 0) & near

    q, k, v = (jnp.where(real[:, None, None], x, 0) for x in (q, k, v))
    grouped = q.reshape(batch, key_heads, -1, width)
    scores = jnp.einsum("bhgd,bkhd->bhgk", grouped, kv_cache.k, **precise) * scale
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    own = jnp.einsum("bhgd,bhd->bhg", grouped, k, **precise)[..., None] * scale
    weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)
    past, own = weights[..., :capacity].astype(q.dtype), weights[..., capacity:]
    out = jnp.einsum("bhgk,bkhd->bhgd", past, kv_cache.v, **precise) + own * v[:, :, None]
    return out.reshape(q.shape).astype(q.dtype), append(kv_cache, k, v, token_index, sinks)


def append(kv_cache: KVCache, k: Array, v: Array, token_index: Array, sinks: int = 0) -> KVCache:
    """The cache with the new token of each sequence in place of the oldest, as `step` returns
    it."""
    batch, capacity = kv_cache.k.shape[:2]
    # out of range = dropped
    place = jnp.where(token_index >= 0, slot_of(token_index, capacity, sinks), capacity)
    row = jnp.arange(batch)
    return KVCache(
        *(
            old.at[row, place].set(x.astype(old.dtype), mode="drop")
            for old, x in zip(kv_cache, (k, v), strict=True)
        )
    )
