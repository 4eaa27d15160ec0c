"""Sequences placed in rows: which row, and which tokens of it, each sequence of a batch takes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Place(NamedTuple):
    """Where one sequence stands: the tokens `start` to `stop` of a row."""

    row: int
    start: int
    stop: int


class Packing:
    """Rows of one length, filled with sequences.

    Attributes:
      rows, length: number of rows, and tokens of each.
      patches: patches of images and videos that each row holds, a fixed number; None = as many as
        the batch brings, 0 = none.
      places: one for each sequence, in the order in which they came.
    """

    def __init__(self, rows: int, length: int, patches: int | None = None):
        self.rows, self.length, self.patches = rows, length, patches
        self.places: list[Place] = []
        self._tokens, self._patches = [0] * rows, [0] * rows

    @classmethod
    def one_per_row(
        cls,
        lengths: Sequence[int],
        length: int,
        rows: int | None = None,
        patches: int | None = None,
    ) -> "Packing":
        """Each sequence at the start of a row of its own.

        lengths: tokens of each sequence. rows: at least as many; None = as many as sequences.
        """
        packing = cls(len(lengths) if rows is None else rows, length, patches)
        packing.places = [Place(row, 0, int(count)) for row, count in enumerate(lengths)]
        packing._tokens = [length] * packing.rows  # nothing else goes into these rows
        return packing

    def add(self, tokens: int, patches: int = 0) -> bool:
        """Place a sequence of this size in the first row that has room. False: no row has."""
        limit = float("inf") if self.patches is None else self.patches
        for row, (used, seen) in enumerate(zip(self._tokens, self._patches, strict=True)):
            if used + tokens <= self.length and seen + patches <= limit:
                self.put(row, tokens, patches)
                return True
        return False

    def put(self, row: int, tokens: int, patches: int = 0) -> None:
        """Place a sequence of this size behind the others of a row, which has room for it."""
        used = self._tokens[row]
        self.places.append(Place(row, used, used + tokens))
        self._tokens[row] += tokens
        self._patches[row] += patches

    def lay_out(self, values: Sequence[np.ndarray], fill=0, dtype=np.int32) -> np.ndarray:
        """Values of the sequences at their places.

        Args:
          values: [..., length of the sequence] for each sequence, in the order of `places`.
          fill: stands where no sequence does.

        Returns:
          [..., rows, length] of `dtype`.
        """
        leading = np.shape(values[0])[:-1] if len(values) else ()
        out = np.full((*leading, self.rows, self.length), fill, dtype)
        for value, place in zip(values, self.places, strict=True):
            out[..., place.row, place.start : place.stop] = value
        return out
