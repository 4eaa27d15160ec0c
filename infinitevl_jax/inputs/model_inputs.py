"""The arrays that the model computes on, built by one function for inference, training and
evaluation.

In a row, padding stands behind the tokens, whatever side the caller pads on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jax import Array

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.arrays import INT32_MAX
from infinitevl_jax.inputs.batch import CheckedBatch, read_batch
from infinitevl_jax.inputs.packing import Packing
from infinitevl_jax.inputs.patches import Patches, bucket, pack_patches, reach
from infinitevl_jax.inputs.positions import VisionItem, sequence_positions
from infinitevl_jax.inputs.segments import split_packed

if TYPE_CHECKING:
    from infinitevl_jax.inputs.frame import Frame


class DecoderInputs(NamedTuple):
    """Tokens of one decoder call."""

    tokens: np.ndarray | Array  # [rows, length] int32
    token_index: np.ndarray | Array  # [rows, length] int32 place in the sequence, -1 = padding
    segment_ids: np.ndarray | Array  # [rows, length] int32 which packed sequence of its row
    # [3, rows, length] int32 rotary positions; None = text that counts up from where the cache ends
    positions: np.ndarray | Array | None
    # [rows, length] int32 place among the vision tower's tokens, -1 = text; None = text only
    vision_index: np.ndarray | Array | None


class ModelInputs(NamedTuple):
    """All that the model computes on, and what is needed to give results in the caller's layout."""

    decoder: DecoderInputs
    patches: Patches | Frame | None
    left_padding: np.ndarray  # [batch] pads that the caller has before each sequence

    @property
    def counts(self) -> np.ndarray:
        """[rows] tokens of each row, without padding."""
        return (self.decoder.token_index >= 0).sum(1)

    def occurred(self, vocab: int) -> np.ndarray:
        """[rows, vocab] bool: which tokens each row holds."""
        out = np.zeros((len(self.decoder.tokens), vocab), bool)
        row, column = np.nonzero(self.decoder.token_index >= 0)
        out[row, self.decoder.tokens[row, column]] = True
        return out


def build_inputs(
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
    packing: Packing | None = None,
    patches_by_row: bool = False,
    truncate_seconds: bool = False,
    generated: int = 0,
) -> ModelInputs:
    """Check a batch and turn it into the model's arrays.

    Args:
      input_ids: [batch, tokens], with vision placeholders expanded. attention_mask: [batch,
        tokens], 1 = token; pads on either side.
      position_ids: [3, batch, tokens], [batch, tokens] or [4, batch, tokens] to use instead of the
        rule in `positions`. Where they start anew at 0, another sequence begins, which sees nothing
        of those before it.
      pixel_values ... second_per_grid_ts: as Hugging Face's Qwen2.5-VL processor returns them.
      start: first position of each sequence (where a cache ends); None = 0.
      length: pad the rows to this many tokens.
      packing: where each sequence stands; its places are as long as the sequences. The patches of
        each row get a row of their own. None: one sequence a row.
      patches_by_row: without `packing`: the patches of each row get a row of their own (sharded
        training) instead of one row for the whole batch.
      truncate_seconds: count a video's time in whole seconds a step, as the reference code does,
        instead of by the published formula (0.5 s becomes 0).
      generated: the first `generated` tokens of each sequence were made by a model. They are text,
        whatever their ids: no image belongs to them.

    Raises InfiniteVLError for arguments that do not fit the model or each other.
    """
    batch = read_batch(
        config,
        input_ids,
        attention_mask,
        position_ids,
        pixel_values,
        image_grid_thw,
        pixel_values_videos,
        video_grid_thw,
        second_per_grid_ts,
        truncate_seconds=truncate_seconds,
    )
    packed = packing is not None
    lengths = [len(s) for s in batch.sequences]
    if packing is None:
        packing = Packing.one_per_row(lengths, length or batch.width)
    elif [place.stop - place.start for place in packing.places] != lengths:
        raise InfiniteVLError(
            f"the packing has {len(packing.places)} places, which do not fit the lengths of the"
            f" {len(lengths)} sequences",
            "add every sequence to the packing, in the order of the batch",
        )
    # ids where they may stand for an image or a video, else -1
    kinds = [np.where(np.arange(len(s)) < generated, -1, s) for s in batch.sequences]
    positions, items = _positions(config, batch, kinds, start)
    segment_ids, token_index = _segments(config, batch, kinds, packing)
    patches = vision_index = None
    if batch.pixels is not None or (config.vision is not None and packing.patches):
        owners = _owners(items)
        rows = [packing.places[b].row if packed or patches_by_row else 0 for b in owners]
        patches, place = pack_patches(
            batch.pixels,
            batch.grids,
            config.vision,
            rows,
            packing.rows if packed or patches_by_row else 1,
            packing.patches,
        )
        vision_index = packing.lay_out(_vision_index(config, kinds, items, place), fill=-1)
    # text alone counts up from where the cache ends, which the device knows
    counted = patches is None and position_ids is None and start is None and not packed
    decoder = DecoderInputs(
        tokens=packing.lay_out(batch.sequences),
        token_index=packing.lay_out(token_index, fill=-1),
        segment_ids=packing.lay_out(segment_ids),
        positions=None if counted else packing.lay_out(positions),
        vision_index=vision_index,
    )
    return ModelInputs(decoder, patches, batch.left_padding)


def _positions(
    config: ModelConfig,
    batch: CheckedBatch,
    kinds: Sequence[np.ndarray],
    start: Sequence[int] | None,
) -> tuple[list[np.ndarray], list[list[VisionItem]]]:
    """[3, length] positions of each sequence, and the images and videos that it takes."""
    images, videos = iter(batch.images), iter(batch.videos)
    positions, items = [], []
    for b, row in enumerate(kinds):
        first = 0 if start is None else int(start[b])
        found, taken = sequence_positions(row, images, videos, config, first, f"sequence {b}")
        if batch.positions is None and found.size and found.max() >= INT32_MAX:
            raise InfiniteVLError(
                f"sequence {b} comes to position {int(found.max()):,}, more than the {INT32_MAX:,}"
                " that there are",
                "start a new cache, or check second_per_grid_ts",
            )
        positions.append(found)
        items.append(taken)
    for kind, given in (("image", batch.images), ("video", batch.videos)):
        count = sum(item.kind == kind for taken in items for item in taken)
        if count < len(given):
            raise InfiniteVLError(
                f"{len(given)} {kind}s came, but input_ids holds the tokens of {count}",
                f"put one {kind} placeholder in the text for every {kind}, in the same order",
            )
    return positions if batch.positions is None else batch.positions, items


def _segments(
    config: ModelConfig, batch: CheckedBatch, kinds: Sequence[np.ndarray], packing: Packing
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """[length] segment ids and [length] token index of each sequence; segments count up in a
    row."""
    following = [0] * packing.rows
    segment_ids, token_index = [], []
    for b, (row, place) in enumerate(zip(kinds, packing.places, strict=True)):
        segment, ordinal = np.zeros(len(row), np.int32), np.arange(len(row), dtype=np.int32)
        if batch.position_ids is not None:
            is_vision = np.isin(row, _placeholders(config))
            segment, ordinal = split_packed(batch.position_ids[b], is_vision, f"sequence {b}")
        segment_ids.append(segment + following[place.row])
        token_index.append(ordinal)
        following[place.row] += int(segment.max(initial=0)) + 1
    return segment_ids, token_index


def _placeholders(config: ModelConfig) -> list[int]:
    return [config.image_token_id, config.video_token_id] if config.vision else []


def _owners(items: Sequence[Sequence[VisionItem]]) -> list[int]:
    """The sequence of each item: images first, then videos, as `CheckedBatch.pixels` has them."""
    return [
        b
        for kind in ("image", "video")
        for b, taken in enumerate(items)
        for item in taken
        if item.kind == kind
    ]


def _vision_index(
    config: ModelConfig,
    kinds: Sequence[np.ndarray],
    items: Sequence[Sequence[VisionItem]],
    place: np.ndarray,
) -> list[np.ndarray]:
    """[length] of each sequence: the place of its image and video tokens among the tower's tokens.

    place: [tokens] of all images, then of all videos.
    """
    out = [np.full(len(row), -1, np.int64) for row in kinds]
    done = 0
    for kind, placeholder in (("image", config.image_token_id), ("video", config.video_token_id)):
        for row, taken, index in zip(kinds, items, out, strict=True):
            count = sum(item.tokens for item in taken if item.kind == kind)
            index[row == placeholder] = place[done : done + count]
            done += count
    return out


def text_inputs(tokens: np.ndarray | Array) -> DecoderInputs:
    """[rows, length] tokens without padding, images or packed sequences: the start of a text, or
    what follows a cache."""
    ordinal = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return DecoderInputs(tokens, ordinal, np.zeros(tokens.shape, np.int32), None, None)


def chunks(inputs: DecoderInputs, size: int) -> Iterator[DecoderInputs]:
    """Chunks of at most `size` tokens for chunked prefill. The last one is padded to a bucket: few
    shapes, few compilations."""
    length = inputs.tokens.shape[1]
    for at in range(0, length, size):
        width = min(size, length - at)
        yield cut_tokens(inputs, at, at + width, min(bucket(width), size))


def cut_tokens(inputs: DecoderInputs, at: int, stop: int, length: int) -> DecoderInputs:
    """Columns `at` to `stop` of every row, padded to `length`. They follow what lies before."""

    def cut(x, fill):
        if x is None:
            return None
        if length == stop - at:
            return x[..., at:stop]
        padding = [(0, 0)] * (x.ndim - 1) + [(0, length - (stop - at))]
        return np.pad(x[..., at:stop], padding, constant_values=fill)

    token_index = cut(inputs.token_index, -1)
    return DecoderInputs(
        tokens=cut(inputs.tokens, 0),
        token_index=np.where(token_index >= 0, token_index - at, -1),
        segment_ids=cut(inputs.segment_ids, 0),
        positions=cut(inputs.positions, 0),
        vision_index=cut(inputs.vision_index, -1),
    )


def packed_shapes(
    config: ModelConfig, packing: Packing, pixel_dtype=np.float32, slice_reach: int | None = None
) -> tuple[DecoderInputs, Patches | None]:
    """Shapes (jax.ShapeDtypeStruct) of what `build_inputs` makes of a batch with this packing, to
    compile ahead of time.

    slice_reach: patches of the longest temporal slice; None = as in `build_inputs`.
    """

    def shape(*sizes: int, dtype=np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    rows, patches = packing.rows, None
    tokens = shape(rows, packing.length)
    if packing.patches:
        ids = shape(rows, packing.patches)
        patches = Patches(
            pixels=shape(rows, packing.patches, config.vision.patch_features, dtype=pixel_dtype),
            row_column=shape(rows, packing.patches, 2),
            patch_index=ids,
            window_ids=ids,
            slice_ids=ids,
            slice_reach=slice_reach or reach(packing.patches),
        )
    positions = shape(3, rows, packing.length)
    vision_index = tokens if packing.patches else None
    return DecoderInputs(tokens, tokens, tokens, positions, vision_index), patches
