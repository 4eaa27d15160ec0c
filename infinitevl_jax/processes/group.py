"""The processes of a run agree on what is not in a compiled program: errors, stops, skipped rows.

They talk through JAX's coordination service over the network of the hosts, so devices are not
waited for: half a millisecond with two processes of one host. All processes call the methods of a
group in the same order.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processes.jax_private import coordination_client

logger = logging.getLogger(__name__)
T = TypeVar("T")

HEARTBEAT = 100  # seconds after which a process that is not heard of is taken for dead
PATIENCE = 6 * 3600  # seconds that a process waits for one that is alive
LAST_WORDS = 60  # the same after an error that it has met alone
GRACE = 2  # seconds between the news of an error elsewhere and the end of this process
_ROOT = "infinitevl"


class Group:
    """One process alone.

    Attributes:
      index: of this process. count: of processes.
    """

    index, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this process writes what belongs to the whole run."""
        return self.index == 0

    def gather(self, say: Callable[[], Any]) -> dict[int, Any]:
        """What say() returns, as JSON, by process; without those where it is None.

        Raises:
          InfiniteVLError: say() raises in another process. What it raises here passes.
        """
        said = say()
        return {} if said is None else {0: said}

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.gather(lambda: True if flag else None))

    def by_first(self, make: Callable[[], T]) -> T | None:
        """make() in the first process, None in the others, which wait for it."""
        made: list[T] = []
        self.gather(lambda: made.append(make()) if self.first else None)
        return made[0] if made else None

    def by_first_for_all(self, make: Callable[[], Any]) -> Any:
        """What make() returns in the first process, as JSON."""
        return self.gather(lambda: make() if self.first else None)[0]

    def first_then_others(self, make: Callable[[], T]) -> T:
        """make(), in the first process before the others: it may write files that they read."""
        made = self.by_first(make)
        others: list[T] = []
        self.gather(lambda: None if self.first else others.append(make()))
        return others[0] if others else made  # type: ignore[return-value]

    def told(self, value: Any) -> Any:
        """The first process's value, as JSON."""
        return self.gather(lambda: value if self.first else None)[0]

    def all_know(self, error: BaseException, step: int) -> bool:
        """Whether all processes are here after the same step, so that they can save it together.

        Call it for an error that ends the run.
        """
        return True

    def beside(self, name: str) -> "Group":
        """The same processes, for a thread of each that agrees with the others of its name,
        whatever the processes agree on meanwhile."""
        return self


class Several(Group):
    """The processes that `jax.distributed` has joined."""

    def __init__(self, root: str = _ROOT):
        self.index, self.count = jax.process_index(), jax.process_count()
        self._client, self._root = coordination_client(), root
        self._round = 0
        self._shared: BaseException | None = None

    def watched(self) -> "Several":
        """This group, which ends its process from now on when another has ended by an error."""
        threading.Thread(target=self._watch, daemon=True, name="other processes").start()
        return self

    def beside(self, name: str) -> Group:
        return Several(f"{self._root}/{name}")

    def gather(self, say: Callable[[], Any]) -> dict[int, Any]:
        mine: Exception | None = None
        try:
            said = say()
            message = None if said is None else {"said": said}
        except Exception as error:
            mine, message = error, {"error": _told(error)}
        found = self._exchange(message, PATIENCE)
        failed = {index: told["error"] for index, told in found.items() if "error" in told}
        if failed:
            self._shared = mine or _from(*next(iter(failed.items())))
            raise self._shared
        return {index: told["said"] for index, told in found.items()}

    def all_know(self, error: BaseException, step: int) -> bool:
        if not isinstance(error, InfiniteVLError):
            return False  # of the devices, or a bug: the others may be anywhere
        try:
            if not self.is_shared(error):
                self._exchange({"error": _told(error)}, LAST_WORDS)
            steps = self._exchange({"said": step}, LAST_WORDS)
        except InfiniteVLError:
            return False
        self._shared = error
        return {told.get("said") for told in steps.values()} == {step}

    def is_shared(self, error: BaseException | None) -> bool:
        """Whether all processes know this error, or that which it comes from."""
        while error is not None and error is not self._shared:
            error = error.__cause__
        return error is not None

    def _exchange(self, message: Any, patience: float) -> dict[int, Any]:
        """The messages of all processes that have one."""
        self._round += 1
        key = f"{self._root}/{self._round}/"
        if message is not None:
            self._client.key_value_set(f"{key}{self.index}", json.dumps(message))
        try:
            self._client.wait_at_barrier(f"{self._root}/round", int(1000 * patience))
        except jax.errors.JaxRuntimeError as error:
            raise InfiniteVLError(
                f"process {self.index} of {self.count} cannot reach the others:"
                f" {str(error).splitlines()[0]}",
                "look for the first error in what the other processes say; the same command on all"
                " of them goes on from the last checkpoint",
            ) from error
        found = {
            int(name.rpartition("/")[2]): json.loads(text)
            for name, text in self._client.key_value_dir_get(key)
        }
        return dict(sorted(found.items()))

    def leave(self, error: BaseException) -> None:
        """Tell the others that this process ends by an error that they may not know."""
        self._client.key_value_set(f"{_ROOT}/left/{self.index}", json.dumps(_told(error)))

    def _watch(self) -> None:
        """Wherever this process waits."""
        while True:
            time.sleep(1)
            try:
                left = self._client.key_value_dir_get(f"{_ROOT}/left/")
            except Exception:  # the service has ended
                return
            for name, text in left:
                index = int(name.rpartition("/")[2])
                if index != self.index:
                    time.sleep(GRACE)  # it may know, and be about to say so itself
                    error = _from(index, json.loads(text))
                    os.write(2, f"error: {error}\n".encode())
                    os._exit(2)


def _told(error: BaseException) -> list:
    """An error as JSON."""
    if isinstance(error, InfiniteVLError):
        return [error.culprit, error.cure, list(error.items)]
    return [f"{type(error).__name__}: {error}", "see what that process says", []]


def _from(index: int, told: list) -> InfiniteVLError:
    culprit, cure, items = told
    return InfiniteVLError(f"process {index}: {culprit}", cure, items)


_group: Group | None = None


def group() -> Group:
    """The processes of this run: those of `jax.distributed`, or this one alone."""
    global _group
    if jax.process_count() == 1:
        return Group()
    if _group is None:
        _group = Several().watched()
    return _group
