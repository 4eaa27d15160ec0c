"""Rows of the global batch, each with a part of the data of its own.

Row r of every batch takes the places r, r + batch, r + 2 batch, ... of the run's order. So a row
depends on the seed alone: not on the number of processes, nor on that of the workers. It remembers
its place, and goes on from there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.data.curriculum import Drawing
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.encoded import EncodedConversation, EncodedRow
from infinitevl_jax.data.mixture import Order
from infinitevl_jax.data.packer import Packer, Piece
from infinitevl_jax.errors import BadRow

PATIENCE = 256  # unusable rows in a row of a batch, after which it is left as it is


class Item(NamedTuple):
    """What a lane adds to a batch.

    Attributes:
      content: conversations of a packed row; or a row with the questions to ask, None where there
        is none.
      place: of the lane behind it, as JSON.
      bad: rows met on the way that cannot be used.
    """

    content: Any
    place: dict[str, Any]
    bad: list[BadRow]


@dataclass
class Lanes:
    """What the lanes of a run share.

    Attributes:
      limit: places of the order that are used; None for no end.
    """

    encoder: Encoder
    order: Order
    data: DataConfig
    seed: int
    limit: int | None = None

    def packed(self, lane: int, place: dict[str, Any]) -> Iterator[Item]:
        """Endless packed rows of a lane; empty ones after its last place.

        place: as `Item.place`; {} at the start.
        """
        bad: list[BadRow] = []
        taken, part = int(place.get("taken", 0)), int(place.get("part", 0))

        def encode(at: int) -> list[EncodedConversation]:
            try:
                return self.encoder.pieces(self.order[at])
            except BadRow as row:
                bad.append(row)
                return []

        def pieces() -> Iterator[Piece | None]:
            nonlocal taken, part
            while self.limit is None or lane + taken * self.data.batch < self.limit:
                at = lane + taken * self.data.batch
                parts = encode(at)
                while part < len(parts):
                    part += 1
                    yield _piece(at, part - 1, parts[part - 1])
                taken, part = taken + 1, 0
                if len(bad) >= PATIENCE:
                    yield None

        waiting = [
            _piece(at, number, parts[number])
            for at, number in place.get("waiting", [])
            if number < len(parts := encode(at))
        ]
        packer = Packer(pieces(), self.data.length, self.data.patches, self.data.lookahead, waiting)
        while True:
            row = packer.row()
            left = [list(piece.key) for piece in packer.waiting]
            place = {"taken": taken, "part": part, "waiting": left}
            yield Item([piece.content for piece in row], place, list(bad))
            bad.clear()

    def branches(self, lane: int, place: dict[str, Any], drawings: dict) -> Iterator[Item]:
        """Endless rows of a lane with the questions to ask."""
        bad: list[BadRow] = []
        taken = int(place.get("taken", 0))
        while True:
            at = lane + taken * self.data.batch
            taken, content = taken + 1, None
            try:
                content = self._ask(at, drawings)
            except BadRow as row:
                bad.append(row)
                if len(bad) < PATIENCE:
                    continue
            yield Item(content, {"taken": taken}, list(bad))
            bad.clear()

    def _ask(self, at: int, drawings: dict[str, Drawing]) -> tuple[EncodedRow, list[int]]:
        number = self.order[at]
        row = self.encoder[number]
        drawing = drawings[self.encoder.dataset.find(number)[0]]
        turns = [branch.turn for branch in row.branches]
        step = at // self.data.batch
        return row, drawing.draw(turns, self.data.questions, step, [self.seed, 0, at])


def _piece(at: int, number: int, part: EncodedConversation) -> Piece:
    return Piece((at, number), part.tokens, part.patches, part)
