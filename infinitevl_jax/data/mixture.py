"""Several sources as one sequence of rows, and the order in which a run draws them."""

from collections.abc import Iterator, Mapping

import grain
import numpy as np

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.data.conversation import Conversation
from infinitevl_jax.data.curriculum import Curriculum, Drawing
from infinitevl_jax.data.sources import Source, open_source, readable, record_of
from infinitevl_jax.errors import InfiniteVLError


class Mixture:
    """The rows of all sources, one source behind the other."""

    def __init__(self, sources: Mapping[str, Source], weights: Mapping[str, float] | None = None):
        """
        Args:
          weights: passes over each source in one epoch; left out, one.
        """
        self.sources = dict(sources)
        self.weights = {name: (weights or {}).get(name, 1.0) for name in sources}
        self._ends = np.cumsum([len(source) for source in self.sources.values()])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, number: int) -> Conversation:
        name, row = self.find(number)
        return self.sources[name][row]

    def find(self, number: int) -> tuple[str, int]:
        """Name of the source of row `number`, and its number there."""
        number = range(len(self))[number]
        which = int(np.searchsorted(self._ends, number, "right"))
        name = list(self.sources)[which]
        return name, number - int(self._ends[which]) + len(self.sources[name])

    def place(self, number: int) -> tuple[str, int]:
        """Title of the source of row `number`, and its number in the source's file."""
        name, row = self.find(number)
        return self.sources[name].title, record_of(self.sources[name], row)

    def sample(self, rows: int) -> "Mixture":
        """About as many rows of each source, at equal distances."""
        parts = {name: Sample(source, rows) for name, source in self.sources.items()}
        return Mixture(parts, self.weights)

    @property
    def title(self) -> str:
        """The sources' titles, as logs show them."""
        return ", ".join(source.title for source in self.sources.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each source."""
        return {name: len(source) for name, source in self.sources.items()}

    def readable(self) -> Iterator[Conversation]:
        """All rows that can be read, for statistics."""
        for source in self.sources.values():
            yield from readable(source)

    def drawings(self) -> dict[str, Drawing]:
        """How questions of each source are drawn."""
        return {
            name: Drawing(getattr(source, "curriculum", Curriculum()), readable(source))
            for name, source in self.sources.items()
        }


class Sample:
    """Some rows of a source, at equal distances."""

    def __init__(self, source: Source, rows: int):
        self.source, self.title = source, source.title
        self.numbers = range(0, len(source), max(1, len(source) // rows))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Conversation:
        return self.source[self.numbers[number]]

    def record(self, number: int) -> int:
        """Number of a row in the source's file."""
        return record_of(self.source, self.numbers[number])


def open_mixture(data: DataConfig, held_out: bool = False) -> Mixture:
    """Open the sources of a configuration.

    held_out: their held-out rows. A source that has none is left out.

    Raises:
      InfiniteVLError: a source cannot be opened, or none has rows.
    """
    found, weights = {}, {}
    for name, config in data.mixture.items():
        key = f"train.data.sources.{name}" if name else "train.data"
        if split := config.held_out if held_out else config.train:
            found[name], weights[name] = open_source(config, split, key), config.weight
            if not len(found[name]):
                raise InfiniteVLError(f"{found[name].title} has no rows in {split!r}", f"see {key}")
            if not data.questions:
                _check_undrawn(found[name], key)
    if not found:
        raise InfiniteVLError(
            f"no source has {'held-out' if held_out else 'training'} rows",
            f"say which they are: train.data.{'held_out' if held_out else 'train'}=...",
        )
    return Mixture(found, weights)


def _check_undrawn(source: Source, key: str) -> None:
    """Raise InfiniteVLError for options that say how questions are drawn, where none are."""
    curriculum, default = getattr(source, "curriculum", Curriculum()), Curriculum()
    names = Curriculum.__struct_fields__
    given = [name for name in names if getattr(curriculum, name) != getattr(default, name)]
    if given:
        raise InfiniteVLError(
            f"{key}.options gives {', '.join(given)}, but train.data.questions is 0, which asks all"
            " questions",
            "train.data.questions=4 draws four for each image; or leave them out:"
            f" {key}.options={{}}",
        )


class Order:
    """The row at each place of an endless run, decided by the seed alone.

    An epoch has `weight` times the rows of each source, shuffled together. At its end, the rows of
    a source have come equally often, some of them once more.

    Attributes:
      epoch: rows of an epoch.
    """

    def __init__(self, mixture: Mixture, seed: int):
        sizes = list(mixture.sizes.values())
        self._taken = [
            max(1, round(size * weight))
            for size, weight in zip(sizes, mixture.weights.values(), strict=True)
        ]
        self.epoch = sum(self._taken)
        self._first = np.cumsum([0, *self._taken])
        self._offset = np.cumsum([0, *sizes])
        self._rows = [_shuffled(size, seed + i) for i, size in enumerate(sizes)]
        self._mixed = _shuffled(self.epoch, seed + len(sizes)) if len(sizes) > 1 else None

    def __getitem__(self, place: int) -> int:
        """Number of the mixture's row at `place`."""
        epoch, within = divmod(place, self.epoch)
        if self._mixed is not None:
            within = int(self._mixed[place])
        source = int(np.searchsorted(self._first, within, "right")) - 1
        drawn = epoch * self._taken[source] + within - int(self._first[source])
        return int(self._rows[source][drawn]) + int(self._offset[source])


def _shuffled(count: int, seed: int) -> grain.MapDataset:
    """Numbers below `count`, shuffled anew in each repetition."""
    return grain.MapDataset.range(count).seed(seed % 2**32).shuffle()
