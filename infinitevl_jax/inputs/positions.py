"""Rotary positions of a sequence with images and videos.

Text counts up on all three axes. A vision segment with merged grid (T, H, W) starts at base =
largest position so far + 1, and is t-major:
    t = base + floor(i_t * seconds_per_grid * tokens_per_second)
    h = base + row
    w = base + column
The text after it starts at the largest position of all three axes + 1. The published weights were
trained with this rule; transformers 5 continues from max(H, W). Seconds are exact fractions, so
rounding never changes a floor.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.rational import exact

MAX_POSITION = 2**31 - 2  # int32 on the device, which also counts the position after it


class VisionItem(NamedTuple):
    """One image or video as the decoder sees it."""

    kind: str  # "image" or "video"
    grid: tuple[int, int, int]  # (frames, rows, columns) in merged tokens
    seconds_per_grid: (
        float | Fraction
    )  # time between two frames of the grid, not negative; 0 for an image

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def vision_positions(item: VisionItem, base: int, tokens_per_second: float) -> np.ndarray:
    """[3, tokens] positions of one segment that starts at `base`. Raises InfiniteVLError for
    positions beyond MAX_POSITION."""
    frames, rows, columns = item.grid
    step = exact(item.seconds_per_grid) * exact(tokens_per_second)
    if base + max(0, frames - 1) * step > MAX_POSITION:
        raise InfiniteVLError(
            f"a {item.kind} of {frames} steps, {float(item.seconds_per_grid):g} s each, ends beyond"
            f" position {MAX_POSITION:,}",
            "give second_per_grid_ts in seconds: temporal_patch_size / fps",
        )
    time = np.array([k * step.numerator // step.denominator for k in range(frames)], np.int64)
    t, h, w = np.meshgrid(time, np.arange(rows), np.arange(columns), indexing="ij")
    return base + np.stack([t, h, w]).reshape(3, -1)


def seconds_per_grid(values: object) -> list[Fraction]:
    """second_per_grid_ts as exact fractions. Raises InfiniteVLError for anything but finite numbers
    of 0 or more."""
    try:
        seconds = [exact(value) for value in np.asarray(values).reshape(-1)]
    except (TypeError, ValueError) as error:
        raise InfiniteVLError(
            f"second_per_grid_ts: {error}", "give numbers, one per video: temporal_patch_size / fps"
        ) from None
    if bad := [value for value in seconds if value < 0]:
        raise InfiniteVLError(
            f"second_per_grid_ts holds {float(bad[0]):g}",
            "seconds are 0 or more: temporal_patch_size / fps",
        )
    return seconds


def check_position_ids(positions: np.ndarray) -> None:
    """Raise InfiniteVLError unless `positions` are integers from 0 to MAX_POSITION."""
    if not np.issubdtype(positions.dtype, np.integer):
        raise InfiniteVLError(f"position_ids are of type {positions.dtype}", "pass integers")
    if (
        positions.size
        and not 0 <= (low := positions.min()) <= (high := positions.max()) <= MAX_POSITION
    ):
        culprit = low if low < 0 else high
        raise InfiniteVLError(
            f"position_ids hold {int(culprit):,}", f"positions run from 0 to {MAX_POSITION:,}"
        )


def sequence_positions(
    tokens: np.ndarray,
    images: Iterator[VisionItem],
    videos: Iterator[VisionItem],
    config: ModelConfig,
    start: int,
    where: str,
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
    kinds = (
        {config.image_token_id: ("image", images), config.video_token_id: ("video", videos)}
        if config.vision
        else {}
    )
    is_vision = np.isin(tokens, list(kinds))
    taken: list[VisionItem] = []
    at, following = 0, start
    while at < len(tokens):
        if not is_vision[at]:
            ahead = np.flatnonzero(is_vision[at:])
            count = int(ahead[0]) if len(ahead) else len(tokens) - at
            out[:, at : at + count] = following + np.arange(count)
            following += count
        else:
            kind, items = kinds[int(tokens[at])]
            item = next(items, None)
            others = np.flatnonzero(tokens[at:] != tokens[at])
            count = int(others[0]) if len(others) else len(tokens) - at
            if item is None or count < item.tokens:
                missing = (
                    f"there is no {kind} left for them"
                    if item is None
                    else f"the next {kind}, grid {item.grid}, takes {item.tokens}"
                )
                raise InfiniteVLError(
                    f"{where}: {count} {kind} tokens stand in a row at token {at}, but {missing}",
                    f"let the processor expand the {kind} placeholders, and pass every {kind} of"
                    " the batch, in order",
                )
            count = item.tokens
            taken.append(item)
            segment = vision_positions(item, following, config.vision.tokens_per_second)
            out[:, at : at + count] = segment
            following = int(segment.max()) + 1
        at += count
    return out, taken
