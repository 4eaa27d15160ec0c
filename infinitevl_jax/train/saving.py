"""Saving of a run: periodically, on request, and before an error ends it."""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from infinitevl_jax.config.train import TrainConfig
from infinitevl_jax.data.skipping import Skipped, SkippedBySource
from infinitevl_jax.data.stream import join_places
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.interrupts import postponed
from infinitevl_jax.locking import Lock
from infinitevl_jax.processes.group import group
from infinitevl_jax.train.checkpoints import Checkpoints
from infinitevl_jax.train.step import TrainState

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Stop(contextlib.AbstractContextManager):
    """Sets `asked` on Ctrl-C, SIGTERM or a closed terminal, and when the time is over.

    The run then finishes its step, saves and ends. A second Ctrl-C ends it at once.
    """

    def __init__(self, ends: float = math.inf):
        """ends: when the time is over, by `time.monotonic`."""
        self._asked, self._ends = False, ends
        self._signals = postponed(self._ask, "SIGINT", "SIGTERM", "SIGHUP")

    @property
    def asked(self) -> bool:
        return self._asked or time.monotonic() >= self._ends

    @asked.setter
    def asked(self, asked: bool) -> None:
        self._asked = asked

    def _ask(self) -> None:
        self.asked = True
        with contextlib.suppress(OSError):  # the terminal may be closed
            print("\nfinishing this step, then saving", file=sys.stderr)

    def __enter__(self) -> "Stop":
        self._signals.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._signals.__exit__(*exception)


class Saver(contextlib.AbstractContextManager):
    """Holds a run's state with its data position, and saves both.

    As a context manager it saves the last good state when an error ends the block. The error says
    where (InfiniteVLError), or the log does.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        lock: Lock | None,
        config: TrainConfig,
        skipped: Skipped | SkippedBySource,
        state: TrainState,
        place: dict[str, Any],
        stop: Stop,
    ):
        """Hold the state of a run.

        Args:
          lock: of the run's folder, in the process that holds it.
          place: JSON position in the data of the batch that follows `state`.
        """
        self.checkpoints, self.lock, self.config, self.skipped = checkpoints, lock, config, skipped
        self.stop, self._together = stop, group()
        self.state, self.metrics = state, None
        self.step = int(state.step)
        self._first, self._places = self.step, {self.step: place}
        self._since, self._saving = time.monotonic(), False

    def advance(self, step_fn: Callable, batch: Any, place: Any) -> None:
        """Run state, metrics = step_fn(state, batch). `place` is the position of the next batch."""
        self.check()  # at most one step runs ahead of the host
        # recorded before the step, so that either state has its position after an interruption
        self._places = {self.step: self._places[self.step], self.step + 1: place}
        self.state, self.metrics = step_fn(self.state, batch)
        self.step += 1

    def check(self) -> None:
        """Wait for the last step.

        Raises:
          InfiniteVLError: loss or gradient is not finite. The state is that before the step.
        """
        for name in ("loss", "grad_norm") if self.metrics is not None else ():
            value = float(getattr(self.metrics, name))
            if not np.isfinite(value):
                raise InfiniteVLError(
                    f"the {name} of step {self.step} is {value}",
                    "lower train.optimizer.peak_lr, or look for bad rows in the data",
                )

    @property
    def due(self) -> bool:
        """Whether a checkpoint is due after this step."""
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        late = minutes and time.monotonic() - self._since >= 60 * minutes
        late = late or self.checkpoints.failed
        return self.step > self._first and bool(late or (every and self.step % every == 0))

    def begin(self) -> None:
        """Begin to save a checkpoint of the state, which is written while the run goes on.

        Raises:
          InfiniteVLError: as `save`; also if the checkpoint before could not be written.
        """
        self.check()
        self._save(
            self.checkpoints.begin if self.config.checkpoint_async else self.checkpoints.save
        )

    def save(self) -> Path:
        """Save a checkpoint of the state unless it exists.

        Returns:
          Its folder.

        Raises:
          InfiniteVLError: the last step failed, or the checkpoint cannot be written.
        """
        self.check()
        return self._save(self.checkpoints.save)

    def _save(self, write: Callable[[TrainState, dict[str, Any]], T]) -> T:
        self._saving = True
        self._together.by_first(lambda: self.lock and self.lock.check())
        places = self._together.gather(lambda: self._places[int(self.state.step)])
        place = {"rows": join_places(list(places.values())), "skipped": self.skipped.get_state()}
        saved = write(self.state, place)
        self._since, self._saving = time.monotonic(), False
        return saved

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            return
        leave = kind is KeyboardInterrupt and self.stop.asked
        leave = leave or not self._together.all_know(error, self.step)
        told = self._last_words(leave)
        if isinstance(error, InfiniteVLError):
            raise InfiniteVLError(error.culprit, error.cure, [*error.items, *told]) from error
        with contextlib.suppress(OSError):  # the terminal may be the cause
            for line in told:
                logger.warning(line)

    def _last_words(self, leave: bool) -> list[str]:
        """Save the state unless saving failed or the run must leave; report what is saved."""
        reason = ""
        if not leave:
            try:
                self.checkpoints.wait()
            except Exception as error:  # the original error is reported first
                self._saving = True
                reason = f"a checkpoint could not be written: {getattr(error, 'culprit', error)}"
        last = self.checkpoints.last
        there = "no step is saved" if last is None else f"step {last} is saved"
        if leave:
            return [there]
        # a failed step may have consumed its input buffers
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            reason = f"step {self.step} was lost with it"
        elif not self._saving:
            try:
                step = int(self.state.step)
                saved = step and self._save(self.checkpoints.save)
                return [f"step {step} is saved in {saved}"] if step else []
            except Exception as error:  # the original error is reported first
                reason = f"step {self.step} could not be saved: {getattr(error, 'culprit', error)}"
        return [reason, there] if reason else [there]
