"""Conversations cut to what fits, and documents divided into parts."""

import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.data.encoded import Branch, EncodedConversation
from infinitevl_jax.errors import InfiniteVLError


def cut_sequence(
    row: EncodedConversation, length: int | None, patches: int | None, config: ModelConfig
) -> EncodedConversation:
    """The beginning of a conversation, up to its last answer that fits.

    Images and videos stay whole. An answer may lose its end.

    Args:
      length, patches: tokens and patches that a row holds; None for any number.

    Raises:
      InfiniteVLError: no token that bears loss is left.
    """
    tokens, answer = row.branch.tokens, row.branch.answer
    stop = len(tokens) if length is None else min(len(tokens), length + 1)
    items: list[tuple[str, int]] = []  # kind, place of the first token
    used = 0
    for kind, start, end, count in _items(row, config):
        if end > stop - 1 or (patches is not None and used + count > patches):
            opened = start > 0 and tokens[start - 1] == config.vision_start_token_id
            stop = min(stop, start - opened)
            break
        items.append((kind, start))
        used += count
    learnt = np.flatnonzero(answer[:stop])
    if not len(learnt):
        where = "" if stop == len(tokens) else f" within its first {stop} tokens"
        raise InfiniteVLError(
            f"no token of it bears loss{where}",
            "give it an answer with a weight other than 0, or make train.data.length larger",
        )
    stop = int(learnt[-1]) + 1
    branch = Branch(tokens[:stop], answer[:stop], row.branch.turn)
    images, videos = (
        sum(kind == name and start < stop for kind, start in items) for name in ("image", "video")
    )
    return EncodedConversation(
        branch,
        *_first(images, row.pixels, row.grids),
        *_first(videos, row.video_pixels, row.video_grids),
        None if not videos or row.seconds is None else row.seconds[:videos],
    )


def divide(row: EncodedConversation, length: int) -> list[EncodedConversation]:
    """A document in parts of at most `length` tokens. Each of its tokens but the first is a target
    once."""
    tokens, answer, turn = row.branch
    return [
        EncodedConversation(
            Branch(tokens[at : at + length + 1], answer[at : at + length + 1], turn), document=True
        )
        for at in range(0, len(tokens) - 1, length)
    ]


def _items(row: EncodedConversation, config: ModelConfig):
    """Kind, first token, token behind the last, and patches of each image and video, in order."""
    if config.vision is None:
        return
    kinds = {
        config.image_token_id: ("image", row.grids),
        config.video_token_id: ("video", row.video_grids),
    }
    tokens, seen = row.branch.tokens, dict.fromkeys(kinds, 0)
    places = np.flatnonzero(np.isin(tokens, list(kinds)))
    at = 0
    while at < len(places):
        token = int(tokens[places[at]])
        kind, grids = kinds[token]
        if grids is None or seen[token] >= len(grids):
            return  # `build_inputs` reports it
        count = int(np.prod(grids[seen[token]]))
        width = count // config.vision.merge_unit
        yield kind, int(places[at]), int(places[at]) + width, count
        seen[token] += 1
        at += width


def _first(
    count: int, pixels: np.ndarray | None, grids: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Pixels and grids of the first `count` items."""
    if not count or pixels is None or grids is None:
        return None, None
    return pixels[: int(grids[:count].prod(1).sum())], grids[:count]
