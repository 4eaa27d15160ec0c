"""Visible ranges: the contiguous rows that each row sees, for tokens that attend to themselves or
to sorted cached keys."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.mask import Mask


def visible_ranges(
    token_index: jax.Array, segment_ids: jax.Array | None, mask: Mask
) -> tuple[jax.Array, ...]:
    """Four [B, T] int32: the first and last key row that each query row sees, and the first and
    last query row that sees each key row. 0 and -1 for pads."""
    real = token_index >= 0
    length = token_index.shape[1]
    row = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), token_index.shape)
    if segment_ids is None:
        start, stop = jnp.zeros_like(row), jnp.sum(real, axis=1, dtype=jnp.int32, keepdims=True) - 1
    else:
        differs = (segment_ids[:, 1:] != segment_ids[:, :-1]) | (real[:, 1:] != real[:, :-1])
        starts = jnp.pad(differs, ((0, 0), (1, 0)), constant_values=True)
        stops = jnp.pad(differs, ((0, 0), (0, 1)), constant_values=True)
        start = jax.lax.cummax(jnp.where(starts, row, 0), axis=1)
        stop = jax.lax.cummin(jnp.where(stops, row, length), axis=1, reverse=True)
    before, after = start, stop
    if mask.window is not None:
        # A window may be as wide as an int32; a row number plus such a window would overflow.
        far = min(mask.window, length) - 1
        before, after = jnp.maximum(start, row - far), jnp.minimum(stop, row + far)
    if mask.causal:
        ends = before, row, row, after
    else:
        ends = before, after, before, after
    return tuple(
        jnp.where(real, x, nothing) for x, nothing in zip(ends, (0, -1, 0, -1), strict=True)
    )


def cached_visible_ranges(
    q_token_index: jax.Array, k_token_index: jax.Array, mask: Mask
) -> tuple[jax.Array, jax.Array]:
    """Two [B, Tq] int32: the first and last key row that each query sees once keys are sorted by
    token index. 0 and -1: none.

    Pads (-1) are sorted to the front. For causal masks without sinks. k_token_index [B, Tk] may be
    in any order.
    """

    def up_to(last):
        return jnp.sum(k_token_index[:, None, :] <= last[:, :, None], axis=2, dtype=jnp.int32)

    last = up_to(q_token_index) - 1
    first = up_to(
        jnp.maximum(q_token_index - mask.window, -1)
        if mask.window is not None
        else jnp.full_like(q_token_index, -1)
    )
    some = (q_token_index >= 0) & (first <= last)
    return jnp.where(some, first, 0), jnp.where(some, last, -1)
