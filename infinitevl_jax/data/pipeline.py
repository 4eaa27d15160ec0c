"""Training batches, an endless stream, and held-out batches. Both are determined by the seed and
the position in the stream.

Rows that cannot be used are skipped; the others keep their order.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import grain
import jax
import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.train import DataConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.data.collate import (
    PackedRows,
    branch_batch,
    empty_packing,
    group_questions,
)
from infinitevl_jax.data.encode import EncodedRow, Encoder
from infinitevl_jax.data.skipping import Skipped
from infinitevl_jax.errors import BadRow, InfiniteVLError


class Batches(Protocol):
    """An iterator over this process's part of the global batches. Its state can be saved and
    restored."""

    def __next__(self) -> TrainBatch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


def _share(data: DataConfig) -> int:
    """Rows of the global batch that belong to this process."""
    if data.batch % jax.process_count():
        raise InfiniteVLError(
            f"train.data.batch {data.batch} does not divide over {jax.process_count()} processes",
            "make it a multiple of their number",
        )
    return data.batch // jax.process_count()


def train_batches(
    encoder: Encoder,
    config: ModelConfig,
    data: DataConfig,
    seed: int,
    skipped: Skipped | None = None,
) -> Batches:
    """Endless batches, shuffled anew each epoch by the seed; each process takes its own rows.

    skipped: counts the rows that cannot be used; left out, as `data` says.
    """
    share, encoder = _share(data), encoder.within(data)
    skipped = skipped or Skipped(len(encoder), data.max_skipped)
    if len(encoder) < data.batch:
        raise InfiniteVLError(
            f"split {data.train!r} of {data.name} has {len(encoder)} rows, a batch takes"
            f" {data.batch}",
            "make train.data.batch smaller",
        )
    if not data.questions:
        return PackedBatches(encoder, config, data, share, _order(encoder, seed), skipped)
    usable = grain.MapDataset.source(_UsableRows(encoder, skipped))
    rows = usable.seed(seed).shuffle()[jax.process_index() :: jax.process_count()].repeat()
    chosen = rows.map_with_index(_Chooser(encoder, data, seed, share))
    # One thread ahead of the device is enough, and leaves the cores to it. Rows that are None are
    # dropped here.
    stream = chosen.to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * share)
    )
    return iter(
        stream.batch(
            share, drop_remainder=True, batch_fn=partial(_collate, config=config, data=data)
        )
    )


class _UsableRows:
    """An encoder's rows, None in place of one that cannot be used."""

    def __init__(self, encoder: Encoder, skipped: Skipped):
        self.encoder, self.skipped = encoder, skipped

    def __len__(self) -> int:
        return len(self.encoder)

    def __getitem__(self, number: int) -> EncodedRow | None:
        try:
            return self.encoder[number]
        except BadRow as row:
            self.skipped.add(row)
            return None


def _order(encoder: Encoder, seed: int) -> grain.MapDataset:
    """This process's row numbers of one epoch, shuffled anew at each repetition."""
    return (
        grain.MapDataset.range(len(encoder))
        .seed(seed)
        .shuffle()[jax.process_index() :: jax.process_count()]
    )


def count_steps(
    encoder: Encoder,
    data: DataConfig,
    epochs: float,
    seed: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> int:
    """Number of steps, at least one, for `epochs` passes over the rows.

    Where conversations are packed, their lengths decide, so every row is encoded once, under
    `progress`. Rows that cannot be used are left out.
    """
    if data.questions:
        return max(1, round(epochs * len(encoder) / data.batch))
    encoder, order = encoder.within(data), _order(encoder, seed)
    sizes: dict[int, tuple[int, int]] = {}
    for number in progress(sorted(int(order[i]) for i in range(len(order)))):
        with contextlib.suppress(BadRow):
            row = encoder.conversation(number)
            sizes[number] = row.tokens, row.patches
    wanted, repeated = max(1, round(epochs * len(order))), order.repeat()
    steps, packing = 0, None
    for taken in range(wanted):
        size = sizes.get(int(repeated[taken]))
        if size is not None and (packing is None or not packing.add(*size)):
            steps, packing = steps + 1, empty_packing(data, _share(data))
            packing.add(*size)
        if (taken + 1) % len(order) == 0:
            packing = None
    return max(1, steps)


class _Chooser:
    """Draws the questions asked of a row, without replacement unless there are too few."""

    def __init__(self, encoder: Encoder, data: DataConfig, seed: int, share: int):
        self.data, self.seed, self.share = data, seed, share
        self.opening = re.compile(data.opening) if data.opening else None
        self.weights: dict[tuple[str, str], float] = {}
        if data.balance:
            counts = Counter(
                turn
                for row in encoder.dataset.readable()
                for turn in zip(row.questions, row.answers, strict=True)
            )
            self.weights = {turn: count**-data.balance for turn, count in counts.items()}

    def __call__(self, number: int, row: EncodedRow) -> tuple[EncodedRow, list[int]]:
        """`number` counts the rows of this process from the start of the run."""
        rng = np.random.default_rng([self.seed, jax.process_index(), number])
        candidates = list(range(len(row.branches)))
        if self.opening and number < self.data.opening_steps * self.share:
            candidates = [
                i for i in candidates if self.opening.search(row.branches[i].turn[0])
            ] or candidates
        chance = np.array([self.weights.get(row.branches[i].turn, 1.0) for i in candidates])
        order = rng.choice(candidates, len(candidates), replace=False, p=chance / chance.sum())
        return row, [int(order[i % len(order)]) for i in range(self.data.questions)]


def _collate(
    items: list[tuple[EncodedRow, list[int]]], config: ModelConfig, data: DataConfig
) -> TrainBatch:
    rows, questions = zip(*items, strict=True)
    return branch_batch(rows, questions, config, data, len(rows), len(rows) * data.questions)


class PackedBatches:
    """Batches of packed conversations, each conversation once an epoch. No batch spans two epochs.
    The state is the number of conversations taken."""

    def __init__(
        self,
        encoder: Encoder,
        config: ModelConfig,
        data: DataConfig,
        rows: int,
        epoch: grain.MapDataset,
        skipped: Skipped,
    ):
        self.encoder, self.config, self.data, self.rows = encoder, config, data, rows
        self.epoch, self.order, self.skipped = len(epoch), epoch.repeat(), skipped
        self.taken = 0

    def __iter__(self) -> "PackedBatches":
        return self

    def __next__(self) -> TrainBatch:
        packed = PackedRows(self.config, self.data, self.rows)
        while _add(packed, self.encoder, int(self.order[self.taken]), self.skipped):
            self.taken += 1
            if self.taken % self.epoch == 0 and packed.conversations:
                break
        return packed.batch()

    def get_state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def set_state(self, state: dict[str, Any]) -> None:
        if (taken := int(state["taken"])) < 0:
            raise ValueError(f"{taken} conversations were taken")
        self.taken = taken


def _add(packed: PackedRows, encoder: Encoder, number: int, skipped: Skipped) -> bool:
    """Add a row's conversation, or skip it if it cannot be used. False: the batch is full."""
    try:
        return packed.add(encoder.conversation(number))
    except BadRow as row:
        skipped.add(row)
        return True


def held_out_batches(
    encoder: Encoder, config: ModelConfig, data: DataConfig, skipped: Skipped | None = None
) -> Iterator[TrainBatch]:
    """Every question of the split once, in batches of the training shape; the last one is filled
    with padding.

    skipped: counts the rows that cannot be used; left out, as `data` says.
    """
    if jax.process_count() > 1:
        raise InfiniteVLError(
            "measuring on the held-out split works in one process so far",
            'set train.data.held_out=""',
        )
    encoder, skipped = encoder.within(data), skipped or Skipped(len(encoder), data.max_skipped)
    if data.questions:
        branches, usable = data.batch * data.questions, _UsableRows(encoder, skipped)
        counts = [
            0 if row is None else len(row.branches)
            for row in (usable[i] for i in range(len(usable)))
        ]
        for group in group_questions(counts, data.batch, branches):
            rows, questions = [encoder[i] for i, _ in group], [which for _, which in group]
            yield branch_batch(rows, questions, config, data, data.batch, branches)
        return
    packed = PackedRows(config, data, data.batch)
    for number in range(len(encoder)):
        if not _add(packed, encoder, number, skipped):
            yield packed.batch()
            packed = PackedRows(config, data, data.batch)
            _add(packed, encoder, number, skipped)
    yield packed.batch()
