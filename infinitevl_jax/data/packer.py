"""Which sequences share a row: decided by their sizes and their order alone."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Something to pack."""

    key: Hashable  # by which it is found again
    tokens: int
    patches: int
    content: Any = None


class Packer:
    """Fills rows one after the other.

    A row begins with the piece that has waited longest. Then the longest waiting piece that fits is
    added, until none fits. What comes next depends on `waiting` and the pieces behind it alone.

    Attributes:
      waiting: pieces that were taken and not packed, in their order.
    """

    def __init__(
        self,
        pieces: Iterator[Piece | None],
        length: int,
        patches: int,
        lookahead: int,
        waiting: Sequence[Piece] = (),
    ):
        """
        Args:
          pieces: each fits into a row. None ends the row that is being filled.
          length, patches: tokens and patches of a row.
          lookahead: pieces that wait at most; fewer if they have the patches of a row.
          waiting: of a packer that goes on here.
        """
        self._pieces, self._length, self._patches = pieces, length, patches
        self._lookahead, self._more = lookahead, True
        self.waiting = list(waiting)

    def __iter__(self) -> Iterator[list[Piece]]:
        """Rows, until all pieces are packed."""
        while (row := self.row()) or self.waiting or self._more:
            yield row

    def row(self) -> list[Piece]:
        """The pieces of the next row, in order; empty after the last."""
        row: list[Piece] = []
        tokens, patches, going = self._length, self._patches, True
        while going:
            going = self._refill()
            fitting = [
                i
                for i, piece in enumerate(self.waiting)
                if piece.tokens <= tokens and piece.patches <= patches
            ]
            if not fitting:
                break
            best = max(fitting, key=lambda i: (self.waiting[i].tokens, -i)) if row else fitting[0]
            row.append(piece := self.waiting.pop(best))
            tokens, patches = tokens - piece.tokens, patches - piece.patches
        return row

    def _refill(self) -> bool:
        """Take pieces until enough wait. False: the row ends here."""
        while (
            self._more
            and len(self.waiting) < self._lookahead
            and sum(piece.patches for piece in self.waiting) <= self._patches
        ):
            try:
                piece = next(self._pieces)
            except StopIteration:
                self._more = False
                break
            if piece is None:
                return False
            self.waiting.append(piece)
        return True
