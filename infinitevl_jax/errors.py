"""Errors and warnings for users."""

import reprlib
from collections.abc import Sequence


class InfiniteVLError(ValueError):
    """Invalid input, file or setting.

    All texts are escaped and shortened by `quoted`.

    Args:
      culprit: what is wrong, one line.
      cure: what to do about it, one line.
      items: details of the culprit, one line each.
    """

    def __init__(self, culprit: str, cure: str, items: Sequence[str] = ()):
        self.culprit, self.cure, self.items = (
            quoted(culprit),
            quoted(cure),
            tuple(map(quoted, items)),
        )
        super().__init__("\n  ".join([self.culprit, *self.items, f"-> {self.cure}"]))

    def __reduce__(self) -> tuple:
        # lets an error cross from a data worker to the main process
        return type(self), (self.culprit, self.cure, self.items)


class BadRow(InfiniteVLError):
    """A row of a data set that cannot be used.

    Args:
      source: data set and split.
      index: number of the row.
      reason: what is wrong with it.
      cure: what to do about it.
    """

    def __init__(self, source: str, index: int, reason: str, cure: str):
        super().__init__(f"{source} row {index}: {reason}", cure)
        self.source, self.index, self.reason = source, index, quoted(reason)

    def __reduce__(self) -> tuple:
        return type(self), (self.source, self.index, self.reason, self.cure)


class InfiniteVLWarning(UserWarning):
    """Something differs from what a file asks for, or cannot be checked in it. The line names the
    file and what to do."""


LONGEST = 2000  # characters of a culprit or a cure


def quoted(text: str) -> str:
    """Escape control characters, direction marks and lone surrogates; shorten long text."""
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def shown(value: object) -> str:
    """Short `repr` of a caller's value for a message, for values of any size or depth."""
    try:
        return _SHORT.repr(value)
    except Exception:  # raised by the value's own __repr__
        return f"an object of type {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 4, 160, 160, 60
