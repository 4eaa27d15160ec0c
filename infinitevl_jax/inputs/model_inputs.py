"""From a batch named as in Hugging Face to the arrays the model computes on (host side, numpy).

Left padding is rolled away here, so that inside every sequence starts at 0 and pads, index -1,
stand at the end.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jax import Array

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.arrays import INT32_MAX, as_numpy, floats, integers
from infinitevl_jax.inputs.patches import Patches, pack
from infinitevl_jax.inputs.positions import (
    VisionItem,
    check_position_ids,
    seconds_per_grid,
    sequence_positions,
)
from infinitevl_jax.inputs.segments import split_packed


class Inputs(NamedTuple):
    """Tokens of one decoder call. Padding stands at the end of each row (packed rows may hold
    several sequences)."""

    tokens: np.ndarray | Array  # [batch, length] int32
    index: np.ndarray | Array  # [batch, length] int32 ordinal in this call, -1 = pad
    segment: np.ndarray | Array  # [batch, length] int32 packed sequence
    positions: (
        np.ndarray | Array | None
    )  # [3, batch, length] int32; None: text that goes on from the cache
    vision_index: (
        np.ndarray | Array | None
    )  # [batch, length] int32 place among the vision tower's tokens, -1 = text


class Prepared(NamedTuple):
    """What `prepare` makes of a batch."""

    inputs: Inputs
    patches: Patches | None
    shift: np.ndarray  # [batch] left padding that was rolled away

    @property
    def counts(self) -> np.ndarray:
        """[batch] tokens of each row, without padding."""
        return (self.inputs.index >= 0).sum(1)

    def occurred(self, vocab: int) -> np.ndarray:
        """[batch, vocab] bool: which tokens each row holds."""
        out = np.zeros((len(self.shift), vocab), bool)
        row, column = np.nonzero(self.inputs.index >= 0)
        out[row, self.inputs.tokens[row, column]] = True
        return out


def text_inputs(tokens: np.ndarray | Array) -> Inputs:
    """Inputs of [batch, length] tokens without padding or images, to follow a cache or to start a
    text."""
    ordinal = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return Inputs(tokens, ordinal, np.zeros(tokens.shape, np.int32), None, None)


def vision_items(
    image_grid_thw,
    video_grid_thw,
    second_per_grid_ts,
    config: ModelConfig,
    truncate_seconds: bool = False,
) -> tuple[list[VisionItem], list[VisionItem]]:
    """Images and videos as the decoder sees them. `truncate_seconds` repeats the reference's
    integer seconds (0.5 s becomes 0)."""
    merge = config.vision.spatial_merge_size if config.vision else 1

    def merged(grid):
        return int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge

    images = [VisionItem("image", merged(g), 0.0) for g in _grids(image_grid_thw)]
    grids = _grids(video_grid_thw)
    seconds = [Fraction(1)] * len(grids)
    if second_per_grid_ts is not None:
        cure = "give the seconds between two steps of each video: temporal_patch_size / fps"
        seconds = seconds_per_grid(
            floats(second_per_grid_ts, "second_per_grid_ts", 0, INT32_MAX, cure)
        )
    if len(seconds) != len(grids):
        raise InfiniteVLError(
            f"second_per_grid_ts has {len(seconds)} entries for {len(grids)} videos",
            "give one per video: temporal_patch_size / fps",
        )
    if truncate_seconds:
        seconds = [Fraction(int(s)) for s in seconds]
    videos = [VisionItem("video", merged(g), s) for g, s in zip(grids, seconds, strict=True)]
    return images, videos


def _grids(grid_thw) -> np.ndarray:
    if grid_thw is None:
        return np.zeros((0, 3), np.int64)
    grids = integers(
        grid_thw,
        "grid_thw",
        ("items", "3"),
        1,
        1 << 20,
        "each is frames, rows, columns in patches, at least 1",
    )
    if grids.shape[1] != 3:
        raise InfiniteVLError(
            f"grid_thw has shape {grids.shape}",
            "it is [items, 3]: frames, rows, columns in patches",
        )
    return grids


def _mask(attention_mask, shape: tuple[int, int]) -> np.ndarray:
    """[batch, tokens] bool, True for tokens."""
    if attention_mask is None:
        return np.ones(shape, bool)
    mask = as_numpy(attention_mask, "attention_mask")
    if mask.shape != shape:
        raise InfiniteVLError(
            f"attention_mask has shape {mask.shape}, input_ids {shape}",
            "pass one mask entry a token",
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise InfiniteVLError(
            f"attention_mask holds {mask[(mask != 0) & (mask != 1)][0]}",
            "pass 1 for a token and 0 for padding, as a tokenizer returns it",
        )
    return mask != 0


def _pixels(name: str, value: np.ndarray, features: int) -> np.ndarray:
    if value.ndim != 2 or value.shape[1] != features:
        raise InfiniteVLError(
            f"{name} has shape {value.shape}, the tower takes pixel values of shape [patches,"
            f" {features}]",
            "use the processor of this checkpoint (patch_size and temporal_patch_size must agree)",
        )
    if value.dtype.kind != "f":
        raise InfiniteVLError(
            f"{name} has dtype {value.dtype}", "pass the floats that the processor returns"
        )
    return floats(value, name, cure="check the image that made them")


def _own_positions(position_ids: np.ndarray, batch: int, width: int) -> np.ndarray:
    """[3, batch, width] of what a caller passes: that, [batch, width], or [4, batch, width]."""
    # Hugging Face packs text positions before the three
    own = position_ids[1:] if position_ids.ndim == 3 and len(position_ids) == 4 else position_ids
    own = np.broadcast_to(own, (3, *own.shape)) if own.ndim == 2 else own
    if own.shape != (3, batch, width):
        raise InfiniteVLError(
            f"position_ids has shape {own.shape}",
            f"pass [3, {batch}, {width}]: temporal, height, width",
        )
    return own


def prepare(
    config: ModelConfig,
    input_ids,
    attention_mask=None,
    position_ids=None,
    pixel_values=None,
    image_grid_thw=None,
    pixel_values_videos=None,
    video_grid_thw=None,
    second_per_grid_ts=None,
    *,
    start: Sequence[int] | np.ndarray | None = None,
    length: int | None = None,
    row_per_sequence: bool = False,
    truncate_seconds: bool = False,
    said: int = 0,
) -> Prepared:
    """Check a batch and turn it into the model's arrays.

    Args:
      input_ids: [batch, tokens], with vision placeholders expanded. attention_mask: [batch,
        tokens], 1 = token; pads on either side.
      position_ids: [3, batch, tokens], [batch, tokens] or [4, batch, tokens] to use instead of the
        rule in `positions`. Where they start anew at 0, another sequence begins, which sees nothing
        of those before it.
      start: first position of each sequence (where a cache left off); None = 0.
      length: pad the rows to this many tokens.
      truncate_seconds: count a video's time in whole seconds a step, as the reference code does,
        instead of by the published formula.
      said: the first `said` tokens of each sequence are text, whatever their ids: what a model made
        itself stands for no picture.
      row_per_sequence: pack each sequence's patches in a row of its own (sharded training) rather
        than all in one.
    """
    vocab = config.text.vocab_size
    cure = f"the vocabulary has {vocab} tokens: use this checkpoint's own tokenizer"
    tokens = integers(input_ids, "input_ids", ("batch", "tokens"), 0, vocab - 1, cure)
    if 0 in tokens.shape:
        raise InfiniteVLError(
            f"input_ids has shape {tokens.shape}", "pass integers [batch, tokens], at least one"
        )
    batch, width = tokens.shape
    mask = _mask(attention_mask, tokens.shape)
    counts = mask.sum(1)
    shift = np.where(counts > 0, mask.argmax(1), 0)
    run = (np.arange(width) >= shift[:, None]) & (np.arange(width) < (shift + counts)[:, None])
    if (holes := (mask != run).any(1)).any():
        raise InfiniteVLError(
            f"attention_mask of sequence {holes.argmax()} has a hole between its tokens",
            "pad at one side only",
        )

    def given(name, value):  # a collator may send empty arrays for a batch of text
        value = None if value is None else as_numpy(value, name)
        return None if value is None or value.size == 0 else value

    pixel_values, image_grid_thw = (
        given("pixel_values", pixel_values),
        given("image_grid_thw", image_grid_thw),
    )
    pixel_values_videos, video_grid_thw = (
        given("pixel_values_videos", pixel_values_videos),
        given("video_grid_thw", video_grid_thw),
    )
    seconds = given("second_per_grid_ts", second_per_grid_ts)
    images, videos = vision_items(image_grid_thw, video_grid_thw, seconds, config, truncate_seconds)
    has_vision = bool(images or videos)
    sources = [("pixel_values", pixel_values, "image_grid_thw", images)]
    sources += [("pixel_values_videos", pixel_values_videos, "video_grid_thw", videos)]
    for name, value, grid_name, items in sources:
        if (value is not None) != bool(items):
            present, absent = (name, grid_name) if value is not None else (grid_name, name)
            raise InfiniteVLError(
                f"{present} came without {absent}", "pass both, as the processor returned them"
            )
    if has_vision and config.vision is None:
        raise InfiniteVLError(
            f"pixel values came for a text model ({config.family})",
            "leave images out, or load a vision-language model",
        )

    # positions, and which item each sequence takes
    image_queue, video_queue = iter(images), iter(videos)
    size = length or width
    positions = np.zeros((3, batch, size), np.int32)
    segment = np.zeros((batch, size), np.int32)
    ordinal = np.tile(np.arange(size, dtype=np.int32), (batch, 1))
    owners: dict[str, list[int]] = {"image": [], "video": []}
    kinds = np.full((batch, size), -1, np.int64)  # ids where they may stand for a picture
    for b in range(batch):
        kinds[b, said : counts[b]] = tokens[b, shift[b] + said : shift[b] + counts[b]]
        row = kinds[b, : counts[b]]
        first = 0 if start is None else int(start[b])
        place, taken = sequence_positions(
            row, image_queue, video_queue, config, first, f"sequence {b}"
        )
        if position_ids is None and place.size and place.max() >= INT32_MAX:
            raise InfiniteVLError(
                f"sequence {b} comes to position {int(place.max()):,}, more than the {INT32_MAX:,}"
                " that there are",
                "start a new cache, or check second_per_grid_ts",
            )
        positions[:, b, : counts[b]] = place
        for item in taken:
            owners[item.kind].append(b)
    for kind, items in (("image", images), ("video", videos)):
        if len(owners[kind]) < len(items):
            raise InfiniteVLError(
                f"{len(items)} {kind}s came, but input_ids holds the tokens of {len(owners[kind])}",
                f"put one {kind} placeholder in the text for every {kind}, in the same order",
            )
    if position_ids is not None:
        position_ids = as_numpy(position_ids, "position_ids")
        own = _own_positions(position_ids, batch, width)
        check_position_ids(own[:, run])
        for b in range(batch):
            here = slice(shift[b], shift[b] + counts[b])
            positions[:, b, : counts[b]] = own[:, b, here]
            is_vision = np.isin(
                kinds[b, : counts[b]],
                [config.image_token_id, config.video_token_id] if config.vision else [],
            )
            split = split_packed(position_ids[..., b, here], is_vision, f"sequence {b}")
            segment[b, : counts[b]], ordinal[b, : counts[b]] = split

    valid = np.arange(size) < counts[:, None]
    rolled = np.zeros((batch, size), np.int32)
    for b in range(batch):
        rolled[b, : counts[b]] = tokens[b, shift[b] : shift[b] + counts[b]]
    patches = vision_index = None
    if has_vision:
        parts = [
            _pixels(name, value, config.vision.patch_features)
            for name, value, *_ in sources
            if value is not None
        ]
        grids = np.concatenate([_grids(image_grid_thw), _grids(video_grid_thw)])
        rows, row_count = (
            (owners["image"] + owners["video"], batch)
            if row_per_sequence
            else ([0] * len(grids), 1)
        )
        patches, place = pack(np.concatenate(parts), grids, config.vision, rows, row_count)
        vision_index = np.full((batch, size), -1, np.int32)
        image_tokens = sum(i.tokens for i in images)
        vision_index[kinds == config.image_token_id] = place[:image_tokens]
        vision_index[kinds == config.video_token_id] = place[image_tokens:]
    elif position_ids is None and start is None:
        positions = None
    index = np.where(valid, ordinal, -1).astype(np.int32)
    return Prepared(Inputs(rolled, index, segment, positions, vision_index), patches, shift)
