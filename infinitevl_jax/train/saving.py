"""When a run saves: every so often, when told to, and before an error ends it."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infinitevl_jax.config.train import TrainConfig
from infinitevl_jax.data.skipping import Skipped
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.interrupts import postponed
from infinitevl_jax.locking import Lock
from infinitevl_jax.train.checkpoints import Checkpoints
from infinitevl_jax.train.step import TrainState

logger = logging.getLogger(__name__)


class Stop(contextlib.AbstractContextManager):
    """Ctrl-C, SIGTERM or a closed terminal set `asked`: the run finishes its step, saves and ends.
    A second Ctrl-C ends it at once."""

    def __init__(self):
        self.asked = False
        self._signals = postponed(self._ask, "SIGINT", "SIGTERM", "SIGHUP")

    def _ask(self) -> None:
        self.asked = True
        with contextlib.suppress(OSError):  # the terminal may be gone
            print("\nfinishing this step, then saving", file=sys.stderr)

    def __enter__(self) -> "Stop":
        self._signals.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._signals.__exit__(*exception)


class Saver(contextlib.AbstractContextManager):
    """Holds a run's state together with its place in the data, and saves both.

    As a context manager: an error that ends the block leaves the last good state saved. Where, it
    says itself (InfiniteVLError) or the log does.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        lock: Lock,
        config: TrainConfig,
        skipped: Skipped,
        state: TrainState,
        place: dict[str, Any],
        stop: Stop,
    ):
        """place: in the data, as JSON, of the batch that follows `state`."""
        self.checkpoints, self.lock, self.config, self.skipped = checkpoints, lock, config, skipped
        self.stop = stop
        self.state, self.metrics = state, None
        self.step = int(state.step)
        self._first, self._places = self.step, {self.step: place}
        self._since, self._saving = time.monotonic(), False

    def advance(self, step_fn: Callable, batch: Any, place: Any) -> None:
        """Take a step: state, metrics = step_fn(state, batch). place: of the batch that follows."""
        self.check()  # at most one step runs ahead of the host
        # first, so that whichever state an interruption leaves has its place
        self._places = {self.step: self._places[self.step], self.step + 1: place}
        self.state, self.metrics = step_fn(self.state, batch)
        self.step += 1

    def check(self) -> None:
        """Wait for the last step.

        Raises InfiniteVLError if it went wrong; the state is then that before it.
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
        """Whether the configuration asks for a checkpoint after this step."""
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        late = minutes and time.monotonic() - self._since >= 60 * minutes
        return self.step > self._first and bool(late or (every and self.step % every == 0))

    def save(self) -> Path:
        """The checkpoint of the state, written unless it is there.

        Raises InfiniteVLError if the last step went wrong, or the checkpoint cannot be written.
        """
        self.check()
        return self._save()

    def _save(self) -> Path:
        self._saving = True
        self.lock.check()
        place = {"rows": self._places[int(self.state.step)], "skipped": self.skipped.get_state()}
        path = self.checkpoints.save(self.state, place)
        self._since, self._saving = time.monotonic(), False
        return path

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            return
        told = self._last_words(leave=kind is KeyboardInterrupt and self.stop.asked)
        if isinstance(error, InfiniteVLError):
            raise InfiniteVLError(error.culprit, error.cure, [*error.items, *told]) from error
        with contextlib.suppress(OSError):  # the terminal may be what failed
            for line in told:
                logger.warning(line)

    def _last_words(self, leave: bool) -> list[str]:
        """Save the state, unless saving failed or there is no time for it, and say what there
        is."""
        reason = ""
        # a step that failed may have taken its input's memory
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state)):
            reason = f"step {self.step} was lost with it"
        elif not self._saving and not leave:
            try:
                step = int(self.state.step)
                return [f"step {step} is saved in {self._save()}"] if step else []
            except Exception as error:  # the one that ends the run is told first
                reason = f"step {self.step} could not be saved: {getattr(error, 'culprit', error)}"
        last = self.checkpoints.last
        there = "no step is saved" if last is None else f"step {last} is saved"
        return [reason, there] if reason else [there]
