"""The plan of the attention kernels for TPU: which keys a query sees, as a range of numbers, and
which pairs of blocks to visit.

`reach` turns order, windows, segments and pads into one rule. Each key has a number, each query a
range of numbers:

    seen = low <= number <= high        (sinks: keys numbered below `sinks` are seen from any `low`)

With an aligned mask, where tokens attend to themselves, the number is the row and the range is one
range of rows, segments included. Otherwise the number is the token index, and segments, if any, are
compared too.

`visits` lists the pairs of a query block and a key block in which some row sees some row, in the
order in which a kernel visits them. The list is made on the device from the numbers. Its length is
the length of the kernel's grid, so blocks outside windows, segments and the filled part of a cache
cost nothing. The kernels find their blocks through scalar prefetch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.visible_ranges import visible_ranges

NOBODY = np.iinfo(np.int32).max  # the number of a key that is a pad: beyond every range
FAR = NOBODY - 1
BLIND = -1  # `high` of a query that is a pad: before every key

# Flags of a visit: it is the first or the last of its outer block.
FIRST, LAST = 1, 2
# Flags of a visit: some pairs are seen; some, none of them with a later key; all.
MASKED, DIAGONAL, WHOLE = (4, 8, 16)
FLAG_BITS = 5


class Reach(NamedTuple):
    """low, high, q_segment_ids: [B, Tq] int32. number, k_segment_ids: [B, Tk] int32. Segments are
    None where they need not be compared."""

    low: jax.Array
    high: jax.Array
    q_segment_ids: jax.Array | None
    number: jax.Array
    k_segment_ids: jax.Array | None


class Visits(NamedTuple):
    """outer, inner: [most] int32, the blocks of each visit, counted through all sequences; outer is
    shifted: block << FLAG_BITS | flags. count: [] int32, the number of visits."""

    outer: jax.Array
    inner: jax.Array
    count: jax.Array


def reach(
    q_token_index: jax.Array,
    k_token_index: jax.Array,
    q_segment_ids: jax.Array | None,
    k_segment_ids: jax.Array | None,
    mask: Mask,
) -> Reach:
    """The arguments of `attention`, as ranges of numbers."""
    dead = q_token_index < 0
    if mask.aligned and not (mask.sinks and mask.window is not None):
        low, high, _, _ = visible_ranges(q_token_index, q_segment_ids, mask)
        number = jnp.arange(k_token_index.shape[1], dtype=jnp.int32)[None]
        q_segment_ids = k_segment_ids = None
    else:
        low, high = jnp.zeros_like(q_token_index), jnp.full_like(q_token_index, FAR)
        if mask.window is not None:
            low = jnp.maximum(q_token_index - (mask.window - 1), 0)
            # Within int32.
            high = q_token_index + jnp.minimum(mask.window - 1, FAR - q_token_index)
        if mask.causal:
            high = q_token_index
        number = k_token_index
        if mask.sinks and mask.window is not None and not mask.causal:
            # Sinks beyond the window are seen too. All keys in between are sinks as well.
            high = jnp.maximum(high, mask.sinks - 1)
    return Reach(
        jnp.where(dead, 0, low).astype(jnp.int32),
        jnp.where(dead, BLIND, high).astype(jnp.int32),
        q_segment_ids,
        jnp.where(k_token_index < 0, NOBODY, number).astype(jnp.int32),
        k_segment_ids,
    )


def visits(reach: Reach, mask: Mask, rows: int, keys: int, by_key: bool = False) -> Visits:
    """The pairs of a block of `rows` queries and a block of `keys` keys to visit, ordered by query
    block (by_key: by key block). Each block of that side is visited at least once; if nothing is
    seen, with no flag for the kind of visit.

    The lengths in `reach` are multiples of `rows` and `keys`.
    """
    kinds = _kinds(reach, mask.sinks if mask.window is not None else 0, rows, keys)
    possible = _possible(mask, kinds.shape[1], kinds.shape[2], rows, keys)
    if has_diagonal(mask, rows, keys):
        kinds = jnp.where(jnp.eye(kinds.shape[1], dtype=bool) & (kinds == MASKED), DIAGONAL, kinds)
    if by_key:
        kinds, possible = kinds.swapaxes(1, 2), possible.T
    batch, outers, inners = kinds.shape
    most = batch * int(np.sum(possible) + np.sum(~possible.any(axis=1)))
    most += 1  # the pipeline also reads the entry after the last visit
    seen = kinds > 0
    seen |= (jnp.arange(inners) == 0) & ~seen.any(axis=2, keepdims=True)
    rank = jnp.cumsum(seen, axis=2, dtype=jnp.int32)
    flags = kinds + jnp.where(rank == 1, FIRST, 0) + jnp.where(rank == rank[:, :, -1:], LAST, 0)
    (place,) = jnp.nonzero(seen.reshape(-1), size=most, fill_value=0)
    place = place.astype(jnp.int32)
    outer = place // inners  # counted through all sequences
    inner = place % inners + outer // outers * inners
    flags = flags.reshape(-1)[place].astype(jnp.int32)
    return Visits(outer << FLAG_BITS | flags, inner, jnp.sum(seen, dtype=jnp.int32))


def has_diagonal(mask: Mask, rows: int, keys: int) -> bool:
    """Whether some pairs of blocks hold the same tokens as queries and keys, with no token that
    sees a later one."""
    return mask.aligned and mask.causal and rows == keys


def _kinds(reach: Reach, sinks: int, rows: int, keys: int) -> jax.Array:
    """[B, query blocks, key blocks]: MASKED, WHOLE or 0. Queries that are pads do not count. Whole
    blocks have no key that is a pad."""

    def by_row(x):
        return x.reshape(x.shape[0], -1, rows)

    def by_key(x):
        return x.reshape(x.shape[0], -1, keys)

    low, high, number = by_row(reach.low), by_row(reach.high), by_key(reach.number)
    live, real = high != BLIND, number != NOBODY
    least, most = number.min(axis=2)[:, None], number.max(axis=2)[:, None]
    most_real = jnp.where(real, number, -1).max(axis=2)[:, None]
    low_most, high_least = (
        jnp.where(live, low, 0).max(axis=2),
        jnp.where(live, high, FAR).min(axis=2),
    )
    near = most_real >= jnp.where(live, low, NOBODY).min(axis=2)[:, :, None]
    some = (least <= high.max(axis=2)[:, :, None]) & (near | (least < sinks))
    every = (most <= high_least[:, :, None]) & ((least >= low_most[:, :, None]) | (most < sinks))
    if reach.q_segment_ids is not None:
        (q_least, q_most), (k_least, k_most) = (
            (jnp.where(ok, x, NOBODY).min(axis=2), jnp.where(ok, x, -NOBODY).max(axis=2))
            for x, ok in ((by_row(reach.q_segment_ids), live), (by_key(reach.k_segment_ids), real))
        )
        some &= (k_least[:, None] <= q_most[:, :, None]) & (k_most[:, None] >= q_least[:, :, None])
        every &= (k_least[:, None] == q_most[:, :, None]) & (k_most[:, None] == q_least[:, :, None])
    return jnp.where(some, jnp.where(every, WHOLE, MASKED), 0)


def _possible(mask: Mask, q_blocks: int, k_blocks: int, rows: int, keys: int) -> np.ndarray:
    """[query blocks, key blocks] booleans: False where an aligned mask rules out that anything is
    seen."""
    possible = np.ones((q_blocks, k_blocks), bool)
    if not mask.aligned:
        return possible
    first_q, first_k = np.arange(q_blocks)[:, None] * rows, np.arange(k_blocks) * keys
    last_q, last_k = first_q + rows - 1, first_k + keys - 1
    if mask.causal:
        possible &= first_k <= last_q
    if mask.window is not None and not mask.sinks:
        possible &= first_q - last_k < mask.window
        if not mask.causal:
            possible &= first_k - last_q < mask.window
    return possible
