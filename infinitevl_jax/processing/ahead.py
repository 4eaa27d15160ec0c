"""Frames that a thread gets ahead of their use."""

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Iterates over another iterator, which a thread of its own moves on.

    Its errors are raised where the item behind them would come.

    Attributes:
      dropped: items that nobody saw.
    """

    def __init__(
        self,
        items: Iterator[T],
        waiting: int,
        *,
        live: bool,
        stopped: Callable[[], bool] = lambda: False,
    ):
        """
        Args:
          waiting: items held, at most.
          live: drop the oldest for one more; otherwise the thread waits.
          stopped: asked while nothing comes. The iteration ends where it is true.
        """
        self.dropped = 0
        self._items, self._waiting, self._live, self._stopped = items, waiting, live, stopped
        self._held: collections.deque[T] = collections.deque()
        self._error: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True, name="frames").start()

    def __iter__(self) -> Iterator[T]:
        while not self._stopped():
            with self._changed:
                if not self._held and not self._ended:
                    self._changed.wait(0.1)
                if self._held:
                    item = self._held.popleft()
                    self._changed.notify_all()
                elif self._ended:
                    break
                else:
                    continue
            yield item
        else:
            return
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the thread at its next item."""
        with self._changed:
            self._ended = True
            self._held.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            for item in self._items:
                with self._changed:
                    while not self._live and len(self._held) >= self._waiting and not self._ended:
                        self._changed.wait()
                    if self._ended:
                        return
                    if len(self._held) >= self._waiting:
                        self._held.popleft()
                        self.dropped += 1
                    self._held.append(item)
                    self._changed.notify_all()
        except BaseException as error:  # for the thread that iterates
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()
