"""Attention of one new token of each sequence to itself and a ring of earlier ones: the definition, and the portable
implementation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Ring(NamedTuple):
    """Keys and values of the last tokens of each sequence: token i lies in slot i mod capacity."""

    k: Array  # [batch, capacity, key heads, D]
    v: Array


def step(q: Array, k: Array, v: Array, ring: Ring, index: Array, window: int | None, scale: float) -> tuple[Array, Ring]:
    """out = softmax(scale q k^T) v over the last `window` tokens, the new one among them; then the new one joins the ring.

    Args:
        q: [batch, query heads, D]; key head j serves the j-th run of query heads.
        k, v: [batch, key heads, D] of the new token.
        ring: holds the tokens before it; empty slots hold any finite numbers.
        index: [batch] int, the new token's ordinal, which is the number of tokens before it; -1 for a sequence that
            stands still.
        window: how many tokens back the new one sees, itself included; None, and more than the ring's capacity, mean all
            that the ring holds once the new token has taken the place of the oldest.

    Returns:
        out [batch, query heads, D] in q's dtype, and the ring with the new token in place of the oldest. Where index is
        -1, out is 0 and the ring comes back bit for bit, whatever q, k and v hold.
    """
    batch, capacity, key_heads, width = ring.k.shape
    window = min(window or capacity, capacity)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    precise = {"preferred_element_type": wide, "precision": "highest" if q.dtype.itemsize >= 4 else None}
    real = index >= 0
    slot = index % capacity
    age = (slot[:, None] - jnp.arange(capacity) - 1) % capacity + 1  # [batch, capacity] how many tokens ago: 1 to capacity
    seen = real[:, None] & (age <= index[:, None]) & (age < window)

    q, k, v = (jnp.where(real[:, None, None], x, 0) for x in (q, k, v))
    grouped = q.reshape(batch, key_heads, -1, width)
    scores = jnp.einsum("bhgd,bkhd->bhgk", grouped, ring.k, **precise) * scale
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    own = jnp.einsum("bhgd,bhd->bhg", grouped, k, **precise)[..., None] * scale
    weights = jax.nn.softmax(jnp.concatenate([scores, own], axis=-1), axis=-1)
    past, own = weights[..., :capacity].astype(q.dtype), weights[..., capacity:]
    out = jnp.einsum("bhgk,bkhd->bhgd", past, ring.v, **precise) + own * v[:, :, None]
    return out.reshape(q.shape).astype(q.dtype), join(ring, k, v, index)


def join(ring: Ring, k: Array, v: Array, index: Array) -> Ring:
    """The ring with the new token of each sequence in place of the oldest, as `step` returns it."""
    batch, capacity = ring.k.shape[:2]
    place = jnp.where(index >= 0, index % capacity, capacity)  # out of range = dropped
    row = jnp.arange(batch)
    return Ring(*(old.at[row, place].set(x.astype(old.dtype), mode="drop") for old, x in zip(ring, (k, v), strict=True)))
