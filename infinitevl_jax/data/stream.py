"""Batches made ahead of the training loop, by worker processes or one thread of this process."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import grain
from grain.experimental import ThreadPrefetchIterDataset

from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.data.lanes import Item
from infinitevl_jax.data.workers import in_workers
from infinitevl_jax.errors import BadRow, InfiniteVLError

AHEAD = 2  # batches that wait, and rows that wait in a worker


class Making(NamedTuple):
    """How items of lanes become a batch.

    Attributes:
      open_lane: opens a lane of this process, by its number and its place.
      batch: makes a batch of the contents of one item from each lane.
      row, join: with workers, these in place of `batch`: makes a part of the batch of one content,
        in a worker; and joins the parts. None: workers hand over the contents.
    """

    open_lane: Callable[[int, dict[str, Any]], Iterator[Item]]
    batch: Callable[[Sequence[Any]], TrainBatch]
    row: Callable[[Any], Any] | None = None
    join: Callable[[Sequence[Any]], TrainBatch] | None = None


class Skips(Protocol):
    """Counts rows that cannot be used."""

    def add(self, row: BadRow) -> None: ...


class Found(NamedTuple):
    """What comes with a batch, or with this process's part of it.

    Attributes:
      bad: rows met on the way that cannot be used.
      teaches: whether a token bears loss.
    """

    bad: list[BadRow]
    teaches: bool


Agree = Callable[[Callable[[], Found]], Found]  # calls it, and joins what all processes found


class Batches:
    """An endless iterator over this process's part of the global batches.

    Reading, decoding and tokenising happen elsewhere. Its state can be saved and restored, also
    with another number of workers or processes.

    Attributes:
      workers: processes that are used; 0 is a thread of this one.
    """

    def __init__(
        self,
        making: Making,
        lanes: Sequence[int],
        workers: int,
        skipped: Skips,
        rows: dict[str, int],
        agree: Agree = lambda find: find(),
    ):
        """
        Args:
          lanes: numbers of this process's rows of the global batch.
          workers: processes; fewer are used if that many do not divide the lanes.
          rows: of each source, to tell a resume with other data.
          agree: joins what the processes of a run find.
        """
        self._agree = agree
        self._making, self._skipped, self._rows = making, skipped, rows
        self._places: dict[int, dict[str, Any]] = {lane: {} for lane in lanes}
        self.workers = max(n for n in range(workers + 1) if n == 0 or len(lanes) % n == 0)
        self._iterator: Any = None
        self._closing: Any = None

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> TrainBatch:
        """The next batch.

        Raises:
          InfiniteVLError: too many rows cannot be used, or no row of the global batch teaches
            anything.
        """
        if self._iterator is None:
            self._iterator = iter(self._stream())
            # at the end of this process too: a thread must not be in the middle of a read then
            self._closing = weakref.finalize(self, self._iterator.close)
        made: list[tuple[TrainBatch, list[Item]]] = []

        def find() -> Found:
            batch, items = next(self._iterator)
            made.append((batch, items))
            return Found([row for item in items for row in item.bad], bool(batch.weights.any()))

        found = self._agree(find)
        for row in found.bad:
            self._skipped.add(row)
        if not found.teaches:
            raise InfiniteVLError(
                "a batch came without a token that bears loss",
                "the data is at its end, or many rows in a row cannot be used",
            )
        ((batch, items),) = made
        self._places = {lane: item.place for lane, item in zip(self._places, items, strict=True)}
        return batch

    def _stream(self) -> grain.IterDataset:
        open_lane, batch, row, join = self._making
        apart = bool(self.workers) and row is not None and join is not None
        rows = _Rows(open_lane, list(self._places.items()), row if apart else None)
        if self.workers:
            rows = in_workers(rows, self.workers, buffer=AHEAD)
        make = partial(_batch, join if apart else batch)
        batches = rows.batch(len(self._places), drop_remainder=True, batch_fn=make)
        return ThreadPrefetchIterDataset(batches, prefetch_buffer_size=AHEAD)

    def get_state(self) -> dict[str, Any]:
        """Where each lane goes on, as JSON."""
        lanes = {str(lane): place for lane, place in self._places.items()}
        return {"lanes": lanes, "rows": self._rows}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of `get_state`.

        Raises:
          InfiniteVLError: the data has another number of rows, or the state is of another version.
        """
        if "lanes" not in state:
            raise InfiniteVLError(
                "its place in the data is of an earlier version",
                "start from its weights: model.from=CHECKPOINT, train.output=ANOTHER_FOLDER",
            )
        for name, count in state["rows"].items():
            if self._rows.get(name) != count:
                title = f"the source {name}" if name else "the data"
                raise InfiniteVLError(
                    f"{title} had {count:,} rows and has {self._rows.get(name, 0):,} now",
                    "go on with the data that the run began with",
                )
        places = {lane: state["lanes"][str(lane)] for lane in self._places}
        if any(int(place.get("taken", 0)) < 0 for place in places.values()):
            raise ValueError(f"{state['lanes']} is no place in the data")
        self.close()
        self._places = places

    def close(self) -> None:
        """Stop threads and processes. Iterating starts them again, at the same place."""
        if self._iterator is not None:
            self._closing()
            self._iterator = None


def join_places(places: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The place of a run in the data, of the places of its processes."""
    if len(places) == 1:
        return places[0]
    lanes = {lane: place for part in places for lane, place in part["lanes"].items()}
    return {**places[0], "lanes": lanes}


def _batch(
    join: Callable[[Sequence[Any]], TrainBatch], items: Sequence[Item]
) -> tuple[TrainBatch, list[Item]]:
    batch = join([item.content for item in items])
    return batch, [item._replace(content=None) for item in items]


class _Rows(grain.IterDataset):
    """One item of each lane in turn. A worker has some of the lanes."""

    def __init__(
        self,
        open_lane: Callable[[int, dict[str, Any]], Iterator[Item]],
        lanes: list[tuple[int, dict[str, Any]]],
        row: Callable[[Any], Any] | None,
    ):
        super().__init__()
        self._open, self._lanes, self._row = open_lane, lanes, row

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """grain calls this in a worker."""
        self._lanes = self._lanes[sl]

    def __iter__(self) -> grain.DatasetIterator:
        lanes = [self._open(lane, place) for lane, place in self._lanes]
        return _RowIterator(lanes, self._row)


class _RowIterator(grain.DatasetIterator):
    def __init__(self, lanes: list[Iterator[Item]], row: Callable[[Any], Any] | None):
        super().__init__()
        self._lanes, self._row, self._next = lanes, row, 0

    def __next__(self) -> Item:
        item = next(self._lanes[self._next % len(self._lanes)])
        self._next += 1
        return item if self._row is None else item._replace(content=self._row(item.content))

    def get_state(self) -> dict[str, Any]:
        return {}  # the place is in the items

    def set_state(self, state: dict[str, Any]) -> None:
        pass
