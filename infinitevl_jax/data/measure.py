"""Sizes of all rows, found once, by worker processes if there are any."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import grain

from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.workers import in_workers
from infinitevl_jax.errors import BadRow

ROWS = 64  # for fewer, a worker takes longer to start than to measure


class Size(NamedTuple):
    """What is packed of a row: a conversation, or a part of a document."""

    tokens: int
    patches: int
    loss: int  # tokens that bear loss


class _Sizes:
    """Sizes of the pieces of each row, or what is wrong with it."""

    def __init__(self, encoder: Encoder):
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.encoder)

    def __getitem__(self, number: int) -> list[Size] | BadRow:
        try:
            return [
                Size(piece.tokens, piece.patches, int(piece.branch.answer[1:].sum()))
                for piece in self.encoder.pieces(number)
            ]
        except BadRow as row:
            return row


def measure(
    encoder: Encoder, workers: int = 0, progress: Callable[[Iterable], Iterable] = iter
) -> list[list[Size] | BadRow]:
    """Sizes of the pieces of each row in order, or what is wrong with it.

    progress: wraps an iterable with a length, to show how far it is.
    """
    workers = min(workers, len(encoder) // ROWS)
    return list(progress(_Each(_Sizes(encoder), workers)))


class _Each:
    def __init__(self, sizes: _Sizes, workers: int):
        self.sizes, self.workers = sizes, workers

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[Size] | BadRow]:
        if not self.workers:
            yield from (self.sizes[number] for number in range(len(self)))
            return
        rows = grain.MapDataset.source(self.sizes).to_iter_dataset(grain.ReadOptions(1, 4))
        iterator = iter(in_workers(rows, self.workers, buffer=16))
        try:
            yield from iterator
        finally:
            iterator.close()
