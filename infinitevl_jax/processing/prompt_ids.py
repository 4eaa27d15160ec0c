"""A rendered conversation and its pictures as one row of token ids."""

import re
from collections.abc import Sequence

import numpy as np

from infinitevl_jax.errors import InfiniteVLError, shown
from infinitevl_jax.processing.spelled import GUARD
from infinitevl_jax.processing.tokenizer import Tokenizer
from infinitevl_jax.processing.vision import Vision
from infinitevl_jax.special_tokens import IMAGE, VIDEO

PLACEHOLDERS = {"image": IMAGE, "video": VIDEO}


def tokenise(
    tokenizer: Tokenizer,
    pieces: Sequence[str],
    vision: Sequence[Vision],
    where: str,
    source: str,
    *,
    max_length: int | None,
    max_pixels: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [length] int32 of the pieces in a row, with each placeholder repeated once for each token
    of its picture, and each id's piece number [length] int32.

    Args:
      where, source: of the conversation and of its chat template, for messages.
      max_length: tokens that are allowed; None for any number.
      max_pixels: of an image, as a message about too many tokens suggests to lower it.

    Raises InfiniteVLError for text whose placeholders do not match the pictures, and for too many
    tokens.
    """
    waiting = {kind: [v for v in vision if v.media.kind == kind] for kind in PLACEHOLDERS}
    for kind, token in PLACEHOLDERS.items():
        found = sum(piece.count(token) for piece in pieces)
        if found != len(waiting[kind]):
            raise InfiniteVLError(
                f"{where}: chat template {source} wrote {found} x {token} for"
                f" {len(waiting[kind])} {kind} item(s)",
                "use a template that writes it once for each picture (remove the file for the"
                " built-in one)",
            )
    queues = {token: iter(waiting[kind]) for kind, token in PLACEHOLDERS.items()}
    ids: list[np.ndarray] = []
    owner: list[np.ndarray] = []
    for number, piece in enumerate(pieces):
        for part in re.split("(" + "|".join(map(re.escape, queues)) + ")", piece):
            if part in queues:
                run = np.full(next(queues[part]).tokens, tokenizer.token_id(part), np.int32)
            else:  # on its own, no side of a guard is a special token
                run = np.asarray(
                    [i for words in part.split(GUARD) for i in tokenizer.encode(words)],
                    np.int32,
                )
            ids.append(run)
            owner.append(np.full(len(run), number, np.int32))
    flat = np.concatenate(ids)
    check_length(len(flat), vision, where, max_length, max_pixels)
    if not len(flat):
        raise InfiniteVLError(
            f"{where}: chat template {source} wrote no text at all", "check the template"
        )
    return flat, np.concatenate(owner)


def check_length(
    length: int, vision: Sequence[Vision], where: str, limit: int | None, max_pixels: int
) -> None:
    """Raise InfiniteVLError if a prompt of `length` tokens is over the limit, with what takes up
    the most."""
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, int | np.integer) or limit < 1:
        raise InfiniteVLError(
            f"max_length is {shown(limit)}",
            "give the most tokens of a prompt, an integer of 1 or more, or None",
        )
    if length <= limit:
        return
    text = length - sum(v.tokens for v in vision)
    largest = sorted(vision, key=lambda v: -v.tokens)
    lines = [
        f"{v.tokens:,} {v.media.name}, {v.grid[0]} x {v.grid[1]} x {v.grid[2]} patches"
        for v in largest[:4]
    ]
    if len(largest) > 4:
        lines.append(f"{sum(v.tokens for v in largest[4:]):,} {len(largest) - 4} further pictures")
    cure = f"raise max_length to {length}"
    if largest and largest[0].tokens > text:
        kind = largest[0].media.kind
        cure += (
            f", or lower max_pixels (now {max_pixels:,} an image)"
            if kind == "image"
            else ", or lower fps, max_frames or max_pixels"
        )
    else:
        cure += ", or shorten the text"
    raise InfiniteVLError(
        f"{where}: the prompt has {length:,} tokens, {length - limit:,} over the limit of"
        f" {limit:,}:"
        + "".join(f"\n    {line}" for line in [f"{text:,} text and markers", *lines]),
        cure,
    )
