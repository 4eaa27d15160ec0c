"""Rows that cannot be used are named and counted; too many of them end the run."""

import threading
from collections.abc import Mapping

from infinitevl_jax.errors import BadRow, InfiniteVLError

FEW = 3  # unusable rows that any split may have: a share of a small split rounds to none


class Skipped:
    """The unusable rows of one split that a run has met.

    They depend on the rows and the settings alone, so a resumed run skips the same ones.
    """

    def __init__(self, rows: int, share: float):
        """
        Args:
          rows: of the split. share: of them that may be unusable; 0 for none, else at least `FEW`.
        """
        self.limit = min(max(FEW, int(share * rows)), rows - 1) if share else 0
        self.rows, self.share = rows, share
        self.reasons: dict[int, str] = {}
        self._said = 0
        self._lock = threading.Lock()

    def add(self, row: BadRow) -> None:
        """Count a row, once.

        Raises InfiniteVLError, which lists the rows, when there are too many; `row` itself where
        none is allowed.
        """
        with self._lock:
            self.reasons.setdefault(row.index, row.reason)
            if len(self.reasons) <= self.limit:
                return
            if not self.limit:
                raise row
            shown = [f"row {index}: {reason}" for index, reason in list(self.reasons.items())[-5:]]
            if len(self.reasons) > len(shown):
                shown.append(f"and {len(self.reasons) - len(shown)} more")
            raise InfiniteVLError(
                f"{row.source}: {len(self.reasons)} of {self.rows:,} rows cannot be used,"
                f" {self.limit} may be:",
                f"{row.cure}; or let more be skipped:"
                f" train.data.max_skipped={self._next_share():g}",
                shown,
            )

    def news(self) -> list[str]:
        """A line for every row added since the last call."""
        with self._lock:
            told, self._said = self._said, len(self.reasons)
            return [
                f"skipped row {index}: {reason}"
                for index, reason in list(self.reasons.items())[told:]
            ]

    def get_state(self) -> dict[str, str]:
        """The rows met so far, as JSON."""
        with self._lock:
            return {str(index): reason for index, reason in self.reasons.items()}

    def set_state(self, state: Mapping[str, str]) -> None:
        """Continue from the result of `get_state`."""
        with self._lock:
            self.reasons = {int(index): str(reason) for index, reason in state.items()}
            self._said = len(self.reasons)

    def _next_share(self) -> float:
        return min(1.0, max(0.01, 2 * max(self.share, len(self.reasons) / self.rows)))


class SkippedBySource:
    """The unusable rows of each source of a mixture. Each may lose the same share."""

    def __init__(self, rows: Mapping[str, int], share: float):
        """rows: of each source, by its title."""
        self.sources = {title: Skipped(count, share) for title, count in rows.items()}

    def add(self, row: BadRow) -> None:
        """As `Skipped.add`, for the source of the row."""
        self.sources[row.source].add(row)

    def news(self) -> list[str]:
        """A line for every row added since the last call."""
        several = len(self.sources) > 1
        return [
            f"{title}: {line}" if several else line
            for title, skipped in self.sources.items()
            for line in skipped.news()
        ]

    def get_state(self) -> dict[str, dict[str, str]]:
        """The rows met so far, as JSON."""
        return {title: skipped.get_state() for title, skipped in self.sources.items()}

    def set_state(self, state: Mapping[str, Mapping[str, str]]) -> None:
        """Continue from the result of `get_state`."""
        for title, rows in state.items():
            if title in self.sources:
                self.sources[title].set_state(rows)
