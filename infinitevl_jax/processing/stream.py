"""Text from token ids that arrive one by one: in all, exactly what decoding them at once says."""

import re
from collections.abc import Callable, Iterable

import numpy as np

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how vocabularies with byte fallback spell a byte
LONG = 64  # tokens without a whole character before the settled ones are let go


class TextStream:
    """Turns ids into text as they come, holding back what a later token may still change.

    `push` returns the text that has become certain, often a word, sometimes nothing; `finish`
    returns what was held back.
    """

    def __init__(self, decode: Callable[[list[int]], str], spelling: Callable[[int], str | None]):
        """
        Args:
          decode: text of a list of ids. spelling: a single token's own spelling, None for an
            unknown id.
        """
        self._decode, self._spelling = decode, spelling
        self._context: list[
            int
        ] = []  # tokens already said, kept because some decoders drop a text's first space
        self._pending: list[int] = []
        self._said = 0  # characters of `pending` already returned

    def push(self, ids: int | Iterable[int]) -> str:
        """Take one id or several; the newly certain text."""
        return "".join(self._push(int(i)) for i in np.atleast_1d(np.asarray(ids)))

    def finish(self) -> str:
        """The held-back rest, unfinished characters shown as U+FFFD. The stream can be used
        again."""
        text = self._text(self._pending)[self._said :]
        self._context, self._pending, self._said = [], [], 0
        return text

    def _text(self, ids: list[int]) -> str:
        return self._decode(self._context + ids)[len(self._decode(self._context)) :]

    def _push(self, token: int) -> str:
        self._pending.append(token)
        # A run of byte tokens is decoded as a whole: any byte of it may spoil all.
        end = len(self._pending)
        while end and BYTE.fullmatch(self._spelling(self._pending[end - 1]) or ""):
            end -= 1
        if end == 0:
            return ""
        text = self._text(self._pending[:end])
        # Of broken bytes only the last replacement can still become a character.
        certain = text.removesuffix("\ufffd")
        new = certain[self._said :]
        self._said = max(self._said, len(certain))
        if certain == text and end == len(self._pending):
            self._let_go(end, text)
        elif end > LONG:
            self._cut(end, text)
        return new

    def _cut(self, end: int, text: str) -> None:
        """Let go of pending tokens up to a place where characters end.

        So broken bytes without end cost no more than other tokens.
        """
        for at in range(end - 1, end - 8, -1):
            head, tail = self._text(self._pending[:at]), self._decode(self._pending[at:end])
            if tail and head + tail == text and len(head) <= self._said:
                self._let_go(at, head)
                return

    def _let_go(self, count: int, text: str) -> None:
        """Pending tokens that are settled become the context, unless they say nothing."""
        settled, self._pending = self._pending[:count], self._pending[count:]
        self._context = settled if text else self._context + settled
        self._said -= len(text)
