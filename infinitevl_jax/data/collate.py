"""Encoded rows become batches of one shape."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.train import DataConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.data.encode import Branch, Encoded, Packable
from infinitevl_jax.inputs.model_inputs import Inputs, prepare
from infinitevl_jax.inputs.patches import Patches, pack
from infinitevl_jax.inputs.positions import VisionItem, sequence_positions


def group_questions(
    counts: Sequence[int], images: int, branches: int
) -> Iterator[list[tuple[int, list[int]]]]:
    """Cut a split into groups of at most `images` rows and `branches` questions.

    counts: questions of each row. Yields lists of (row, which of its questions); a row that does
      not fit goes on in the next group.
    """
    group: list[tuple[int, list[int]]] = []
    used = 0
    for row, count in enumerate(counts):
        done = 0
        while done < count:
            if len(group) == images or used == branches:
                yield group
                group, used = [], 0
            take = min(count - done, branches - used)
            group.append((row, list(range(done, done + take))))
            done, used = done + take, used + take
    if group:
        yield group


def branch_batch(
    rows: Sequence[Encoded],
    questions: Sequence[Sequence[int]],
    config: ModelConfig,
    data: DataConfig,
    images: int,
    branches: int,
) -> TrainBatch:
    """Images with some of their questions each, the questions on branches.

    Args:
      rows: at most `images` of them, which fit the shapes (`Encoder.within`); missing ones are
        padding.
      questions: which questions of each row; at most `branches` in all.
    """
    prefix_length = data.prefix_length
    tokens = np.zeros((images, prefix_length), np.int32)
    mask = np.zeros((images, prefix_length), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row.prefix)] = row.prefix
        mask[i, : len(row.prefix)] = 1
    pixels = {}
    if seen := [row for row in rows if row.pixels is not None]:
        pixels = {
            "pixel_values": np.concatenate([r.pixels for r in seen]),
            "image_grid_thw": np.concatenate([r.grid for r in seen]),
        }
    prepared = prepare(config, tokens, mask, **pixels, length=prefix_length, row_per_sequence=True)
    chosen = [
        (row.branches[i], parent)
        for parent, (row, which) in enumerate(zip(rows, questions, strict=True))
        for i in which
    ]
    batch, targets, weights = _lay_out([b for b, _ in chosen], branches, data.length)
    parents = np.zeros(branches, np.int32)
    parents[: len(chosen)] = [parent for _, parent in chosen]
    return TrainBatch(prepared.patches, prepared.inputs, batch, parents, targets, weights)


def _lay_out(
    branches: Sequence[Branch], count: int, length: int
) -> tuple[Inputs, np.ndarray, np.ndarray]:
    """Branches as `count` rows of `length` tokens, and what follows each token. The last token of
    an answer is never an input."""
    tokens, targets = np.zeros((2, count, length), np.int32)
    index = np.full((count, length), -1, np.int32)
    weights = np.zeros((count, length), np.float32)
    for row, branch in enumerate(branches):
        size = len(branch.tokens) - 1
        tokens[row, :size], targets[row, :size] = branch.tokens[:-1], branch.tokens[1:]
        index[row, :size] = np.arange(size)
        weights[row, :size] = branch.answer[1:]
    return Inputs(tokens, index, np.zeros((count, length), np.int32), None, None), targets, weights


class Room:
    """How far the rows of a packed batch are filled. A conversation goes into the first row that
    has room."""

    def __init__(self, data: DataConfig, rows: int):
        self.data = data
        self.used = [0] * rows
        self.patches = [0] * rows

    def take(self, tokens: int, patches: int) -> int | None:
        """The row that a conversation of this size goes into, None if none has room."""
        for row, (length, seen) in enumerate(zip(self.used, self.patches, strict=True)):
            if length + tokens <= self.data.length and seen + patches <= self.data.patches:
                self.used[row] += tokens
                self.patches[row] += patches
                return row
        return None


class PackedRows(Room):
    """Conversations in the order they come, each in the first row that has room; a full batch
    refuses the next one."""

    def __init__(self, config: ModelConfig, data: DataConfig, rows: int):
        super().__init__(data, rows)
        self.config = config
        self.items: list[tuple[int, Packable]] = []

    def add(self, branch: Branch, pixels: np.ndarray | None, grid: np.ndarray | None) -> bool:
        """Take a conversation that fits the shapes (`Encoder.within`), or return False if no row
        has room."""
        conversation = Packable(branch, pixels, grid)
        row = self.take(conversation.tokens, conversation.patches)
        if row is not None:
            self.items.append((row, conversation))
        return row is not None

    def batch(self) -> TrainBatch:
        """The batch of what was taken."""
        rows, length, vision = len(self.used), self.data.length, self.config.vision
        tokens, index, segment, vision_index, targets = np.zeros((5, rows, length), np.int32)
        index -= 1
        vision_index -= 1
        positions = np.zeros((3, rows, length), np.int32)
        weights = np.zeros((rows, length), np.float32)
        patches = place = None
        if vision is not None and self.data.patches:
            seen = [
                (row, item.pixels, item.grid) for row, item in self.items if item.pixels is not None
            ]
            empty = [np.zeros((0, vision.patch_features), np.float32)], [np.zeros((0, 3), np.int64)]
            pixels, grids = (
                np.concatenate(a + [s[i] for s in seen]) for i, a in zip((1, 2), empty, strict=True)
            )
            patches, place = pack(
                pixels, grids.astype(np.int64), vision, [s[0] for s in seen], rows
            )
            patches = _widen(patches, self.data.patches)
        filled, segments, placed = [0] * rows, [0] * rows, 0
        for row, (branch, _, grid) in self.items:
            ids = branch.tokens[:-1]
            here = (row, slice(filled[row], filled[row] + len(ids)))
            tokens[here], targets[here], weights[here] = ids, branch.tokens[1:], branch.answer[1:]
            index[here], segment[here] = np.arange(len(ids)), segments[row]
            merge = vision.spatial_merge_size if vision else 1
            images = (
                []
                if grid is None
                else [
                    VisionItem("image", (int(t), int(h) // merge, int(w) // merge), 0.0)
                    for t, h, w in grid
                ]
            )
            positions[(slice(None), *here)], _ = sequence_positions(
                ids, iter(images), iter([]), self.config, 0, "a packed conversation"
            )
            if images:
                count = sum(i.tokens for i in images)
                vision_index[here] = _scatter(
                    ids == self.config.image_token_id, place[placed : placed + count]
                )
                placed += count
            filled[row] += len(ids)
            segments[row] += 1
        inputs = Inputs(
            tokens, index, segment, positions, None if patches is None else vision_index
        )
        return TrainBatch(patches, None, inputs, None, targets, weights)


def _scatter(where: np.ndarray, values: np.ndarray) -> np.ndarray:
    out = np.full(len(where), -1, np.int32)
    out[where] = values
    return out


def _widen(patches: Patches, size: int) -> Patches:
    """Pad the rows of packed patches to `size`, and let a slice reach as far, so that every batch
    has one shape."""
    more = size - patches.index.shape[1]
    cut = {
        f.name: getattr(patches, f.name)
        for f in dataclasses.fields(patches)
        if f.name != "slice_reach"
    }
    fill = {"pixels": 0, "row_column": 0, "index": -1, "window": -1, "slice": -1}
    resized = {
        name: np.pad(
            x, [(0, 0), (0, max(more, 0))] + [(0, 0)] * (x.ndim - 2), constant_values=fill[name]
        )[:, :size]
        for name, x in cut.items()
    }
    return Patches(**resized, slice_reach=1 << (size - 1).bit_length())
