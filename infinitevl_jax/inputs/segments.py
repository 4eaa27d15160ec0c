"""Finds the sequences packed in a row by its position ids, which start anew with each sequence
(Hugging Face's batches without padding)."""

import numpy as np

from infinitevl_jax.errors import InfiniteVLError


def split_packed(
    position_ids: np.ndarray, vision: np.ndarray, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Segments of one row.

    Args:
      position_ids: [length] text positions, [3, length] (temporal, height, width), or [4, length]
        with the text positions before the three, as Hugging Face's collators write them.
      vision: [length] bool, True for image and video tokens.
      where: how an error names the row.

    Returns:
      segment_ids [length] int32, the number of each token's sequence; token_index [length] int32,
      the token's place in it.

    Raises:
      InfiniteVLError: positions that neither continue nor start anew at 0, so the sequences cannot
        be told apart.
    """
    length = position_ids.shape[-1]
    if position_ids.ndim == 2 and len(position_ids) == 3:
        # Inside a sequence the temporal axis never falls, and only its first token stands at 0 on
        # all three axes.
        place, step = position_ids[0], np.diff(position_ids[0])
        anew = (position_ids[:, 1:] == 0).all(0) & ((position_ids[:, :-1] > 0).any(0) | ~vision[1:])
        unclear = (step < 0) & ~anew
        cure = "start each packed sequence at 0 on all three axes"
    else:
        place = position_ids[0] if position_ids.ndim == 2 else position_ids
        step = np.diff(place)
        anew = place[1:] == 0
        unclear = (step != 1) & ~anew
        cure = (
            "count up by one and start each packed sequence at 0; positions that jump inside a"
            " sequence go into [3, batch, tokens]"
        )
    if unclear.any():
        at = int(unclear.argmax())
        raise InfiniteVLError(
            f"position_ids of {where} go from {place[at]} to {place[at + 1]} at token {at + 1}",
            cure,
        )
    segment_ids = np.concatenate([[0], np.cumsum(anew)])[:length].astype(np.int32)
    first = np.flatnonzero(np.concatenate([[True], anew])[:length])
    token_index = np.arange(length) - (first[segment_ids] if length else 0)
    return segment_ids, token_index.astype(np.int32)
