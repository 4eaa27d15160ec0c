"""Incremental decoding of token ids. The pieces add up to the text of all ids."""

import re
from collections.abc import Callable, Iterable

import numpy as np

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte token of vocabularies with byte fallback
LONG = 64  # pending tokens without a whole character before settled ones are dropped


class TextStream:
    """Decodes ids as they arrive, holding back text that a later token may change.

    `push` returns new final text, which may be empty; `finish` returns the rest.
    """

    def __init__(self, decode: Callable[[list[int]], str], spelling: Callable[[int], str | None]):
        """Create a stream.

        Args:
          decode: text of a list of ids.
          spelling: spelling of a single token; None for an unknown id.
        """
        self._decode, self._spelling = decode, spelling
        # emitted tokens, kept because some decoders drop the first space of a text
        self._context: list[int] = []
        self._pending: list[int] = []
        self._said = 0  # characters of `_pending` already returned

    def push(self, ids: int | Iterable[int]) -> str:
        """Add one or more ids and return the new final text."""
        return "".join(self._push(int(i)) for i in np.atleast_1d(np.asarray(ids)))

    def finish(self) -> str:
        """Return the rest, with U+FFFD for incomplete characters, and reset the stream."""
        text = self._text(self._pending)[self._said :]
        self._context, self._pending, self._said = [], [], 0
        return text

    def _text(self, ids: list[int]) -> str:
        return self._decode(self._context + ids)[len(self._decode(self._context)) :]

    def _push(self, token: int) -> str:
        self._pending.append(token)
        # Byte tokens in a row are decoded together: any byte may make all of them invalid.
        end = len(self._pending)
        while end and BYTE.fullmatch(self._spelling(self._pending[end - 1]) or ""):
            end -= 1
        if end == 0:
            return ""
        text = self._text(self._pending[:end])
        # Only the last replacement character can still become a character.
        certain = text.removesuffix("\ufffd")
        new = certain[self._said :]
        self._said = max(self._said, len(certain))
        if certain == text and end == len(self._pending):
            self._let_go(end, text)
        elif end > LONG:
            self._cut(end, text)
        return new

    def _cut(self, end: int, text: str) -> None:
        """Drop pending tokens up to a character boundary; invalid bytes must not accumulate."""
        for at in range(end - 1, end - 8, -1):
            head, tail = self._text(self._pending[:at]), self._decode(self._pending[at:end])
            if tail and head + tail == text and len(head) <= self._said:
                self._let_go(at, head)
                return

    def _let_go(self, count: int, text: str) -> None:
        """Move pending tokens to the context, or append them to it if they have no text."""
        settled, self._pending = self._pending[:count], self._pending[count:]
        self._context = settled if text else self._context + settled
        self._said -= len(text)
