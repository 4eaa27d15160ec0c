"""A batch named as in Hugging Face: checked and read, or joined from single sequences."""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.arrays import INT32_MAX, as_numpy, floats, integers
from infinitevl_jax.inputs.positions import VisionItem, check_position_ids, seconds_per_grid


class TokenSequence(NamedTuple):
    """One sequence, with placeholders expanded, and its images and videos."""

    tokens: np.ndarray  # [length]
    pixels: np.ndarray | None = None  # [patches, features] f32
    grids: np.ndarray | None = None  # [images, 3] frames, rows, columns in patches
    video_pixels: np.ndarray | None = None  # [patches, features] f32
    video_grids: np.ndarray | None = None  # [videos, 3]
    seconds: np.ndarray | None = None  # [videos] f64, seconds a temporal patch spans


def join_sequences(
    sequences: Sequence[TokenSequence], rows: int | None = None, length: int | None = None
) -> dict[str, np.ndarray]:
    """One batch of several sequences, padded on the right.

    rows, length: shape of input_ids; rows beyond the sequences are padding. None: as many rows as
      sequences, as long as the longest.
    """
    rows = len(sequences) if rows is None else rows
    length = max((len(s.tokens) for s in sequences), default=0) if length is None else length
    input_ids, attention_mask = np.zeros((2, rows, length), np.int32)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence.tokens)] = sequence.tokens
        attention_mask[row, : len(sequence.tokens)] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    for name, field in (
        ("pixel_values", "pixels"),
        ("image_grid_thw", "grids"),
        ("pixel_values_videos", "video_pixels"),
        ("video_grid_thw", "video_grids"),
        ("second_per_grid_ts", "seconds"),
    ):
        values = [getattr(sequence, field) for sequence in sequences]
        if seen := [value for value in values if value is not None]:
            batch[name] = np.concatenate(seen)
    return batch


class CheckedBatch(NamedTuple):
    """A batch as `read_batch` returns it."""

    sequences: list[np.ndarray]  # [length] int64 each: token ids without padding
    width: int  # columns of input_ids
    left_padding: np.ndarray  # [batch] pads before each sequence
    position_ids: list[np.ndarray] | None  # as given: [length], [3, length] or [4, length] each
    positions: list[np.ndarray] | None  # the rotary axes of `position_ids`: [3, length] each
    images: list[VisionItem]
    videos: list[VisionItem]
    pixels: np.ndarray | None  # [patches, features], images first, then videos
    grids: np.ndarray  # [images + videos, 3] frames, rows, columns in patches


def read_batch(
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
    truncate_seconds: bool = False,
) -> CheckedBatch:
    """Check a batch and take its padding off. The arguments are those of `build_inputs`.

    Raises InfiniteVLError for arguments that do not fit the model or each other.
    """
    vocab = config.text.vocab_size
    cure = f"the vocabulary has {vocab} tokens: use this checkpoint's own tokenizer"
    tokens = integers(input_ids, "input_ids", ("batch", "tokens"), 0, vocab - 1, cure)
    if 0 in tokens.shape:
        raise InfiniteVLError(
            f"input_ids has shape {tokens.shape}", "pass integers [batch, tokens], at least one"
        )
    mask = _mask(attention_mask, tokens.shape)
    left_padding = np.where(mask.any(1), mask.argmax(1), 0)
    given = {
        name: _given(name, value)
        for name, value in (
            ("pixel_values", pixel_values),
            ("image_grid_thw", image_grid_thw),
            ("pixel_values_videos", pixel_values_videos),
            ("video_grid_thw", video_grid_thw),
            ("second_per_grid_ts", second_per_grid_ts),
        )
    }
    image_grids, video_grids = _grids(given["image_grid_thw"]), _grids(given["video_grid_thw"])
    images, videos = _vision_items(
        config, image_grids, video_grids, given["second_per_grid_ts"], truncate_seconds
    )
    parts = _pixel_parts(config, given)
    own, axes = (None, None) if position_ids is None else _position_ids(position_ids, mask)
    return CheckedBatch(
        sequences=[row[keep] for row, keep in zip(tokens, mask, strict=True)],
        width=tokens.shape[1],
        left_padding=left_padding,
        position_ids=own,
        positions=axes,
        images=images,
        videos=videos,
        pixels=np.concatenate(parts) if parts else None,
        grids=np.concatenate([image_grids, video_grids]),
    )


def _given(name: str, value) -> np.ndarray | None:
    """An optional array; None where it is empty: a collator may send such for a batch of text."""
    array = None if value is None else as_numpy(value, name)
    return None if array is None or array.size == 0 else array


def _mask(attention_mask, shape: tuple[int, int]) -> np.ndarray:
    """[batch, tokens] bool, True for tokens, which are neighbours in each row."""
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
    mask = mask != 0
    starts = np.diff(mask, axis=1, prepend=False) & mask
    if (holes := starts.sum(1) > 1).any():
        raise InfiniteVLError(
            f"attention_mask of sequence {holes.argmax()} has a hole between its tokens",
            "pad at one side only",
        )
    return mask


def _position_ids(position_ids, mask: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """`CheckedBatch.position_ids` and `.positions`."""
    given, (batch, width) = as_numpy(position_ids, "position_ids"), mask.shape
    # Hugging Face packs text positions before the three
    axes = given[1:] if given.ndim == 3 and len(given) == 4 else given
    axes = np.broadcast_to(axes, (3, *axes.shape)) if axes.ndim == 2 else axes
    if axes.shape != (3, batch, width):
        raise InfiniteVLError(
            f"position_ids has shape {axes.shape}",
            f"pass [3, {batch}, {width}]: temporal, height, width",
        )
    check_position_ids(axes[:, mask])
    rows = list(enumerate(mask))
    return [given[..., row, keep] for row, keep in rows], [axes[:, row, keep] for row, keep in rows]


def _grids(grid_thw: np.ndarray | None) -> np.ndarray:
    """[items, 3] int64."""
    if grid_thw is None:
        return np.zeros((0, 3), np.int64)
    cure = "each is frames, rows, columns in patches, at least 1"
    grids = integers(grid_thw, "grid_thw", ("items", "3"), 1, 1 << 20, cure)
    if grids.shape[1] != 3:
        raise InfiniteVLError(
            f"grid_thw has shape {grids.shape}",
            "it is [items, 3]: frames, rows, columns in patches",
        )
    return grids


def _vision_items(
    config: ModelConfig,
    image_grids: np.ndarray,
    video_grids: np.ndarray,
    second_per_grid_ts: np.ndarray | None,
    truncate_seconds: bool,
) -> tuple[list[VisionItem], list[VisionItem]]:
    """Images and videos as the decoder sees them."""
    merge = config.vision.spatial_merge_size if config.vision else 1

    def merged(grid):
        return int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge

    seconds = [Fraction(1)] * len(video_grids)
    if second_per_grid_ts is not None:
        cure = "give the seconds between two steps of each video: temporal_patch_size / fps"
        seconds = seconds_per_grid(
            floats(second_per_grid_ts, "second_per_grid_ts", 0, INT32_MAX, cure)
        )
    if len(seconds) != len(video_grids):
        raise InfiniteVLError(
            f"second_per_grid_ts has {len(seconds)} entries for {len(video_grids)} videos",
            "give one per video: temporal_patch_size / fps",
        )
    if truncate_seconds:
        seconds = [Fraction(int(s)) for s in seconds]
    images = [VisionItem("image", merged(grid), 0.0) for grid in image_grids]
    videos = [
        VisionItem("video", merged(grid), s) for grid, s in zip(video_grids, seconds, strict=True)
    ]
    return images, videos


def _pixel_parts(config: ModelConfig, given: dict[str, np.ndarray | None]) -> list[np.ndarray]:
    """[patches, features] of the images and of the videos, where there are any."""
    sources = ("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")
    for name, grid_name in sources:
        if (given[name] is None) != (given[grid_name] is None):
            present, absent = (grid_name, name) if given[name] is None else (name, grid_name)
            raise InfiniteVLError(
                f"{present} came without {absent}", "pass both, as the processor returned them"
            )
    found = [(name, given[name]) for name, _ in sources if given[name] is not None]
    if found and config.vision is None:
        raise InfiniteVLError(
            f"pixel values came for a text model ({config.family})",
            "leave images out, or load a vision-language model",
        )
    return [_pixels(name, value, config.vision.patch_features) for name, value in found]


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
