"""What the slots of an engine hold: requests, which are answered, and open sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.serve.generation import Request as Arguments
from infinitevl_jax.serve.generation import StopStrings
from infinitevl_jax.serve.slots import Piece, Slots

if TYPE_CHECKING:
    from infinitevl_jax.inputs.model_inputs import ModelInputs
    from infinitevl_jax.serve.engine import Engine


class Reader:
    """A slot's owner, as the engine sees it.

    Attributes:
      slot: where it is; -1 before and after. pieces: what is still to be read. fresh: whether the
        slot's cache is to be taken as empty. past: the cache to begin from. begin: what the slot
        becomes once all is read; None: nothing is to be said.
    """

    def __init__(self, past: Cache | None):
        self.slot = -1
        self.pieces: Iterator[Piece] | None = None
        self.fresh, self.past = past is None, past
        self.begin: Slots | None = None
        self.error: BaseException | None = None
        self.done = False


class Request(Reader):
    """One sequence of an engine. Iterating gives its new tokens as they are made.

    Attributes:
      tokens: so far. done: whether there will be no more. cancelled: whether `cancel` ended it.
      cache: of a request with `keep_cache`, once it is done. Its last token is not in it.
    """

    def __init__(self, engine: Engine, arguments: Arguments, past: Cache | None, keep: bool):
        super().__init__(past)
        self._engine, self.arguments, self.keep = engine, arguments, keep
        self._stopped = StopStrings(arguments, 1) if arguments.stop_strings else None
        self.tokens: list[int] = []
        self.cancelled = False
        self.cache: Cache | None = None

    def __iter__(self) -> Iterator[int]:
        given = 0
        while True:
            while given < len(self.tokens):
                given += 1
                yield self.tokens[given - 1]
            if self.error is not None:
                raise self.error
            if self.done:
                return
            self._engine.step()

    def result(self) -> np.ndarray:
        """All new tokens [new], int32."""
        return np.fromiter(self, np.int32)

    def cancel(self) -> None:
        """End it here; its slot is free for another."""
        self._engine.cancel(self)

    def take(self, token: int) -> bool:
        """Add a token. Returns whether it is the last."""
        self.tokens.append(token)
        if token in self.arguments.ends or len(self.tokens) == self.arguments.max_new_tokens:
            return True
        return self._stopped is not None and self._stopped([token])[0]


class OpenSequence(Reader):
    """A sequence that grows and stays in its slot, such as a video stream.

    It says nothing itself: questions are requests that go on from a copy of its cache.
    """

    def __init__(self, engine: Engine, past: Cache | None):
        super().__init__(past)
        self._engine = engine

    @property
    def reading(self) -> bool:
        """Whether there is something left to be read."""
        return self.pieces is not None

    def extend(self, inputs: Iterable[tuple[ModelInputs, int]]) -> None:
        """Have more tokens read, when the engine works.

        inputs: pairs of the inputs of one row, and the position of its first token where they have
          none. Each is asked for when its turn comes.
        """
        self._engine.extend(self, inputs)

    def read(self) -> None:
        """Work until all that came is read."""
        while self.pieces is not None and self.error is None:
            self._engine.step()
        if self.error is not None:
            raise self.error

    def cache(self) -> Cache:
        """A copy of what the sequence has left behind so far."""
        self.read()
        return self._engine.copy_cache(self)

    def close(self) -> None:
        """Give the slot back."""
        self._engine.cancel(self)
