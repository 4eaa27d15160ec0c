"""What the processes of a run tell one another about their parts of the data."""

from collections.abc import Callable, Iterable
from typing import Any

from infinitevl_jax.data.stream import Agree, Found
from infinitevl_jax.errors import BadRow
from infinitevl_jax.processes.group import Group


class BadRows:
    """Unusable rows that this process has met and not told yet."""

    def __init__(self):
        self._rows: list[BadRow] = []

    def add(self, row: BadRow) -> None:
        self._rows.append(row)

    def take(self) -> list[list]:
        """As JSON, those since the last call."""
        taken, self._rows = self._rows, []
        return as_json(taken)


def as_json(rows: Iterable[BadRow]) -> list[list]:
    """Unusable rows as JSON."""
    return [[row.source, row.index, row.reason, row.cure] for row in rows]


def bad_rows(told: Iterable[dict[str, Any]]) -> list[BadRow]:
    """The unusable rows of all processes, from what they said."""
    return [BadRow(*row) for said in told for row in said.get("bad", ())]


def agreement(together: Group) -> Agree:
    """How the processes agree on a batch: on unusable rows, and on whether it teaches anything."""

    def agree(find: Callable[[], Found]) -> Found:
        def say() -> dict[str, Any] | None:
            found = find()
            said = {"bad": as_json(found.bad), "blank": not found.teaches}
            return {key: value for key, value in said.items() if value} or None

        told = together.gather(say).values()
        blank = sum(said.get("blank", False) for said in told)
        return Found(bad_rows(told), blank < together.count)

    return agree
