"""Training batches, an endless stream, and held-out batches. Both are determined by the seed and
the position in the stream.

Rows that cannot be used are skipped; the others keep their order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.data.collate import (
    PackedRows,
    branch_batch,
    group_questions,
    join_rows,
    rows_batch,
)
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.encoded import EncodedConversation, EncodedRow
from infinitevl_jax.data.lanes import Lanes
from infinitevl_jax.data.measure import Size, measure
from infinitevl_jax.data.mixture import Mixture, Order
from infinitevl_jax.data.packer import Packer, Piece
from infinitevl_jax.data.skipping import Skipped, SkippedBySource
from infinitevl_jax.data.stream import Agree, Batches, Making, Skips
from infinitevl_jax.data.workers import check_shared_memory
from infinitevl_jax.errors import BadRow, InfiniteVLError

PLACES = 2**31  # conversations of a run whose steps are counted


def skipping(mixture: Mixture, data: DataConfig) -> SkippedBySource:
    """Counts the rows of a mixture that cannot be used, as `data` allows them."""
    rows: dict[str, int] = {}
    for source in mixture.sources.values():
        rows[source.title] = rows.get(source.title, 0) + len(source)
    return SkippedBySource(rows, data.max_skipped)


def train_batches(
    encoder: Encoder,
    config: ModelConfig,
    data: DataConfig,
    seed: int,
    skipped: Skipped | SkippedBySource | None = None,
    epochs: float = 0,
    rows: Sequence[int] | None = None,
    agree: Agree = lambda find: find(),
) -> Batches:
    """Endless batches, shuffled anew each epoch by the seed.

    Args:
      skipped: counts the rows that cannot be used; left out, as `data` says.
      epochs: with packed conversations: rows of padding follow after this many; 0 for no end.
      rows: of the global batch that this process makes; None for all.
      agree: joins what the processes of a run find.
    """
    encoder, mixture = encoder.within(data), encoder.dataset
    order = Order(mixture, seed)
    if order.epoch < data.batch:
        raise InfiniteVLError(
            f"{mixture.title} has {order.epoch} rows in an epoch, a batch takes {data.batch}",
            "make train.data.batch smaller",
        )
    if data.workers:
        check_shared_memory(_row_bytes(config, data), data.workers)
    limit = _places(order, epochs) if epochs and not data.questions else None
    lanes = Lanes(encoder, order, data, seed, limit)
    if data.questions:
        making = Making(
            partial(lanes.branches, drawings=mixture.drawings()),
            partial(_join_branches, config=config, data=data),
        )
    else:
        settings = {"data": data, "config": config}
        batch, row = partial(rows_batch, **settings), partial(_row, **settings)
        making = Making(lanes.packed, batch, row, join_rows)
    return Batches(
        making,
        range(data.batch) if rows is None else rows,
        data.workers,
        skipped or skipping(mixture, data),
        mixture.sizes,
        agree,
    )


def _row_bytes(config: ModelConfig, data: DataConfig) -> int:
    """Bytes of what a worker hands over at a time, at most: a packed row, or an image with
    questions."""
    if config.vision is None:
        features = patches = 0
    else:
        features, patches = config.vision.patch_features, data.patches
        if data.questions:
            patches = data.prefix_length * config.vision.merge_unit
    texts = data.prefix_length + data.questions * data.length if data.questions else data.length
    return 4 * features * patches + 64 * texts


def _row(
    content: Sequence[EncodedConversation], data: DataConfig, config: ModelConfig
) -> TrainBatch:
    return rows_batch([content], data, config)


def _join_branches(
    items: Sequence[tuple[EncodedRow, list[int]] | None], config: ModelConfig, data: DataConfig
) -> TrainBatch:
    found = [item for item in items if item is not None]
    rows, questions = [row for row, _ in found], [which for _, which in found]
    return branch_batch(rows, questions, config, data, len(items), len(items) * data.questions)


def _places(order: Order, epochs: float) -> int:
    return max(1, round(epochs * order.epoch))


def count_steps(
    encoder: Encoder,
    data: DataConfig,
    epochs: float,
    seed: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> int:
    """Number of steps, at least one, for `epochs` passes over the mixture.

    Where conversations are packed, their lengths decide, so every row is encoded once, under
    `progress`. Rows that cannot be used are left out.
    """
    order = Order(encoder.dataset, seed)
    if data.questions:
        return max(1, round(epochs * order.epoch / data.batch))
    places = _places(order, epochs)
    if places > PLACES:
        raise InfiniteVLError(
            f"train.epochs = {epochs:g} are {places:,} conversations",
            "give train.steps instead",
        )
    sizes = measure(encoder.within(data), data.workers, progress)
    return max(1, *(count for count, _ in packed_rows(order, data, places, sizes)))


def packed_rows(
    order: Order, data: DataConfig, places: int, sizes: Sequence[list[Size] | BadRow]
) -> list[tuple[int, int]]:
    """For each row of the batch: how many packed rows it needs for these places, and the tokens in
    them. `train_batches` packs in the same way."""
    found = []
    for lane in range(data.batch):
        pieces = (
            Piece((at, i), tokens, patches)
            for at in range(lane, places, data.batch)
            for row in [sizes[order[at]]]
            if not isinstance(row, BadRow)
            for i, (tokens, patches, _) in enumerate(row)
        )
        rows = tokens = 0
        for row in Packer(pieces, data.length, data.patches, data.lookahead):
            if row:
                rows, tokens = rows + 1, tokens + sum(piece.tokens for piece in row)
        found.append((rows, tokens))
    return found


def held_out_batches(
    encoder: Encoder,
    config: ModelConfig,
    data: DataConfig,
    skipped: Skips | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[TrainBatch]:
    """Every question, or conversation, of the split once, in batches of the training shape; the
    last one is filled with padding.

    Args:
      skipped: counts the rows that cannot be used; left out, as `data` says.
      rows: of the global batch that this process makes, from its part of the split; None for all.
    """
    encoder, skipped = encoder.within(data), skipped or skipping(encoder.dataset, data)
    rows = range(data.batch) if rows is None else rows
    own = set(rows)
    numbers = [number for number in range(len(encoder)) if number % data.batch in own]
    if data.questions:
        yield from _held_out_questions(encoder, config, data, skipped, numbers, len(rows))
        return
    packed = PackedRows(config, data, len(rows))
    for number in numbers:
        try:
            pieces = encoder.pieces(number)
        except BadRow as row:
            skipped.add(row)
            continue
        for piece in pieces:
            if not packed.add(piece):
                yield packed.batch()
                packed = PackedRows(config, data, len(rows))
                packed.add(piece)
    if packed.conversations:
        yield packed.batch()


def blank_batch(config: ModelConfig, data: DataConfig, rows: int) -> TrainBatch:
    """A batch of padding."""
    if data.questions:
        return branch_batch([], [], config, data, rows, rows * data.questions)
    return rows_batch([[]] * rows, data, config)


def _held_out_questions(
    encoder: Encoder,
    config: ModelConfig,
    data: DataConfig,
    skipped: Skips,
    numbers: Sequence[int],
    images: int,
) -> Iterator[TrainBatch]:
    counts = []
    for number in numbers:
        try:
            counts.append(len(encoder[number].branches))
        except BadRow as row:
            skipped.add(row)
            counts.append(0)
    branches = images * data.questions
    for group in group_questions(counts, images, branches):
        rows, questions = [encoder[numbers[i]] for i, _ in group], [which for _, which in group]
        yield branch_batch(rows, questions, config, data, images, branches)
