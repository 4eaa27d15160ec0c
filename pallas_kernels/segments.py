"""Numbers the sequences of packed, padded rows."""

import jax
import jax.numpy as jnp


def segment_numbers(token_index: jax.Array | None, segment_ids: jax.Array) -> jax.Array:
    """Number the sequences of each row: 0 at first, one more at each change of segment among valid
    tokens.

    Args:
        token_index: [batch, length] int, -1 marks a pad. None: every token is valid.
        segment_ids: [batch, length] int, any ids; an id that comes back after another one is a new
            sequence.

    Returns:
        [batch, length] int32, never decreasing along a row. A pad has the number of the last valid
        token before it (0 if there is none).
    """
    row = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    if token_index is None:
        before = jnp.broadcast_to(row - 1, segment_ids.shape)
    else:
        newest = jax.lax.cummax(jnp.where(token_index >= 0, row, -1), axis=1)
        before = jnp.pad(newest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    changed = (before >= 0) & (
        segment_ids != jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1)
    )
    if token_index is not None:
        changed &= token_index >= 0
    return jnp.cumsum(changed, axis=1, dtype=jnp.int32)
