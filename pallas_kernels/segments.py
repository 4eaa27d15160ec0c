"""Where one sequence ends and the next begins in a packed, padded row."""

import jax
import jax.numpy as jnp


def segment_numbers(token_index: jax.Array | None, segment_ids: jax.Array) -> jax.Array:
    """Number the stretches of equal segment among the valid tokens of each row: 0 at first, one more at each change.

    Args:
        index: [batch, length] int, -1 marks a pad; None if every token is valid.
        segment: [batch, length] int, any ids; an id that comes back after another one is a new sequence.

    Returns:
        [batch, length] int32, never falling along a row. A pad bears the number of the last valid token before it (0 if
        there is none).
    """
    row = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    if token_index is None:
        before = jnp.broadcast_to(row - 1, segment_ids.shape)
    else:
        newest = jax.lax.cummax(jnp.where(token_index >= 0, row, -1), axis=1)
        before = jnp.pad(newest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    changed = (before >= 0) & (segment_ids != jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1))
    if token_index is not None:
        changed &= token_index >= 0
    return jnp.cumsum(changed, axis=1, dtype=jnp.int32)
