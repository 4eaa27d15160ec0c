"""Rotary positions of a sequence with images and videos (host side, numpy).

Text counts up on all three axes. A vision segment with merged grid (T, H, W) starts at base = largest so far + 1:
t = base + floor(i_t * seconds_per_grid * tokens_per_second), h = base + row, w = base + column, t-major; what follows starts at the
largest over all three axes + 1. This is the rule the published weights were trained with (transformers 5 goes on from max(H, W)).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError


class VisionItem(NamedTuple):
    """One image or video as the decoder sees it."""

    kind: str  # "image" or "video"
    grid: tuple[int, int, int]  # (frames, rows, columns) in merged tokens
    seconds_per_grid: float  # time between two frames of the grid; 0 for an image

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def vision_positions(item: VisionItem, base: int, tokens_per_second: float) -> np.ndarray:
    """[3, tokens] positions of one segment that starts at `base`."""
    frames, rows, columns = item.grid
    t, h, w = np.meshgrid(np.arange(frames), np.arange(rows), np.arange(columns), indexing="ij")
    t = np.floor(t * (item.seconds_per_grid * tokens_per_second)).astype(np.int64)
    return base + np.stack([t, h, w]).reshape(3, -1)


def sequence_positions(
    tokens: np.ndarray, images: Iterator[VisionItem], videos: Iterator[VisionItem], config: ModelConfig, start: int, where: str
) -> tuple[np.ndarray, list[VisionItem]]:
    """Positions of one sequence.

    Args:
      tokens: [length] ids without padding.
      images, videos: the batch's items in order; this sequence takes the next ones.
      start: position of the first token (0, or where a cache left off).
      where: how an error names the sequence.

    Returns:
      [3, length] int64, and the items taken.
    """
    out = np.empty((3, len(tokens)), np.int64)
    sources = {config.image_token_id: ("image", images), config.video_token_id: ("video", videos)} if config.vision else {}
    is_vision = np.isin(tokens, list(sources))
    taken: list[VisionItem] = []
    at, following = 0, start
    while at < len(tokens):
        if not is_vision[at]:
            ahead = np.flatnonzero(is_vision[at:])
            run = int(ahead[0]) if len(ahead) else len(tokens) - at
            out[:, at : at + run] = following + np.arange(run)
            following += run
        else:
            kind, items = sources[int(tokens[at])]
            item = next(items, None)
            others = np.flatnonzero(tokens[at:] != tokens[at])
            run = int(others[0]) if len(others) else len(tokens) - at
            if item is None or run < item.tokens:
                missing = f"there is no {kind} left for them" if item is None else f"the next {kind}, grid {item.grid}, takes {item.tokens}"
                raise InfiniteVLError(
                    f"{where}: {run} {kind} tokens stand in a row at token {at}, but {missing}",
                    f"let the processor expand the {kind} placeholders, and pass every {kind} of the batch, in order",
                )
            run = item.tokens
            taken.append(item)
            segment = vision_positions(item, following, config.vision.tokens_per_second)
            out[:, at : at + run] = segment
            following = int(segment.max()) + 1
        at += run
    return out, taken
