"""The one exception that users of this package are meant to read."""

import reprlib
from collections.abc import Sequence


class InfiniteVLError(ValueError):
    """Input, file or setting that cannot work. The message names the culprit, then the cure; it
    fits on one screen.

    culprit, cure: one line each. items: what the culprit consists of, a line each under it.
    All quote what came from outside: control characters and lone surrogates are escaped, long text
      is cut in the middle.
    """

    def __init__(self, culprit: str, cure: str, items: Sequence[str] = ()):
        self.culprit, self.cure, self.items = (
            quoted(culprit),
            quoted(cure),
            tuple(map(quoted, items)),
        )
        super().__init__("\n  ".join([self.culprit, *self.items, f"-> {self.cure}"]))

    def __reduce__(self) -> tuple:
        # so that a data worker's error crosses to the main process
        return type(self), (self.culprit, self.cure, self.items)


class BadRow(InfiniteVLError):
    """A row of a data set that cannot be used.

    source: the data set and its split. index: the row's number in it. reason: what is wrong with
      it.
    """

    def __init__(self, source: str, index: int, reason: str, cure: str):
        super().__init__(f"{source} row {index}: {reason}", cure)
        self.source, self.index, self.reason = source, index, quoted(reason)

    def __reduce__(self) -> tuple:
        return type(self), (self.source, self.index, self.reason, self.cure)


class InfiniteVLWarning(UserWarning):
    """Something works otherwise than a file asks for. One line, which names the file and what to
    do."""


LONGEST = 2000  # characters of a culprit or a cure


def quoted(text: str) -> str:
    """Text for a terminal: what would move its cursor, change its colours or its direction is
    written as an escape."""
    text = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"


def shown(value: object) -> str:
    """`repr` of a value that a caller passed, for a message: short, however large or deep the value
    is."""
    try:
        return _SHORT.repr(value)
    except Exception:  # a __repr__ of the caller's own
        return f"an object of type {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 4, 160, 160, 60
