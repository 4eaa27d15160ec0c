"""A run's checkpoints: RUN/checkpoints/STEP, each at the same time one of our checkpoint folders.

STEP/params, frozen and optimizer hold the state (step_files.py), STEP/data/metadata the place in
the data. Beside them lie config.json, the processor's files and the manifest, so that STEP can be
exported, or opened with `InfiniteVL.from_pretrained`.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding

from infinitevl_jax.checkpoints.array_reader import is_format_2
from infinitevl_jax.checkpoints.array_writer import LazyArray, layers_of, on_host, write_arrays
from infinitevl_jax.checkpoints.files import FROZEN, MANIFEST, PARAMS, copy_side_files, side_files
from infinitevl_jax.checkpoints.manifest import FORMAT, Manifest
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processes.group import Group, group
from infinitevl_jax.train.shared_files import check_arrays, share_arrays
from infinitevl_jax.train.step import TrainState
from infinitevl_jax.train.step_files import PLACE, StepFiles, Unusable
from infinitevl_jax.writing import (
    StorageError,
    keep_aside,
    megabytes,
    storage,
    sync,
    sync_tree,
)

_log = logging.getLogger(__name__)
_STEP = re.compile(r"0|[1-9][0-9]*")
_PATIENCE = 1.0  # seconds of waiting before that is logged
_Parts = Mapping[str, Iterable[LazyArray]]


class Checkpoints:
    """Writes and reads them; keeps the newest `keep`.

    Attributes:
      best: of steps, the one that is kept as well, if any.
    """

    def __init__(
        self,
        run: Path,
        files: Path,
        manifest: Manifest,
        keep: int,
        layers: Mapping[str, Sequence[str]] | None = None,
    ):
        """
        Args:
          run: the run's folder.
          files: a folder with the model's side files. manifest: what export needs to know beside
            them.
          layers: name of a parameter of the state -> its names on disk: those of its layers, if it
            is a stack of them. A parameter that is not named here keeps its name.
        """
        self.folder, self.files, self.manifest = run.absolute() / "checkpoints", files, manifest
        self.keep, self._step_files = keep, StepFiles(files, layers or {})
        self._frozen: int | None = None  # a step that has this run's frozen parameters
        self._together = group()
        self._beside = self._together.beside("checkpoint")
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: futures.Future[bool] | None = None
        self.best: Callable[[Sequence[int]], int | None] = lambda steps: None
        with storage(self.folder):
            self._together.by_first(self._prepare)

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
        self._check_steps()

    @property
    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, the newest first."""
        found = (path for path in self.folder.iterdir() if _STEP.fullmatch(path.name))
        return sorted((int(path.name) for path in found if path.is_dir()), reverse=True)

    @property
    def last(self) -> int | None:
        """The newest checkpoint's step, None if there is none."""
        return next(iter(self.steps), None)

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / str(step)

    def save(self, state: TrainState, place: Mapping[str, Any]) -> Path:
        """Write the state after a step, and `place` (JSON) in the data; on the disk and whole when
        this returns. All processes of a run call this together.

        Raises StorageError, which names the step to go back to, if it cannot be written.
        """
        self.wait()
        if (step := self._new_step(state)) is not None:
            with self._explained(step, self._together):
                self._check_room(state)
                self._write(step, self._parts(state), place, self._together)
        return self.path(int(state.step))

    def begin(self, state: TrainState, place: Mapping[str, Any]) -> None:
        """`save` in a thread of its own, from a copy in the host's memory: `state` may be donated
        when this returns. `wait` tells how it ended.

        Frozen parameters are never copied: where there is no step whose files can be shared, this
        is `save`.

        Raises StorageError: of the save before; or there is no room for this one.
        """
        self.wait()
        if state.frozen and self._frozen is None:
            self.save(state, place)
        elif (step := self._new_step(state)) is not None:
            with self._explained(step, self._together):
                self._check_room(state)
                state = state._replace(frozen={})
                parts = {item: [*map(on_host, found)] for item, found in self._parts(state).items()}
            place = dict(place)
            self._writing = self._thread.submit(self._write_beside, step, parts, place)

    def _write_beside(self, step: int, parts: _Parts, place: Mapping[str, Any]) -> bool:
        with self._explained(step, self._beside):
            return self._write(step, parts, place, self._beside, beside=True)

    @property
    def failed(self) -> bool:
        """Whether the save that was begun has ended without a checkpoint."""
        writing = self._writing
        return writing is not None and writing.done() and not _succeeded(writing)

    def wait(self) -> None:
        """Wait for the save that was begun, if there is one.

        Raises StorageError, as `save` does.
        """
        if (writing := self._writing) is not None:
            if not futures.wait([writing], _PATIENCE).done:
                _log.info("waiting for the checkpoint that is being written")
                futures.wait([writing])
            self._writing = None
            writing.result()

    def _new_step(self, state: TrainState) -> int | None:
        """The state's step, None if it is saved already."""
        step = int(state.step)
        return None if step == self._together.told([self.last])[0] else step

    @contextlib.contextmanager
    def _explained(self, step: int, together: Group) -> Iterator[None]:
        """Around the writing of a step: an error says which step is there."""
        try:
            with storage(self.path(step), called=f"checkpoint {self.path(step)}"):
                yield
        except InfiniteVLError as error:  # here, or in another process
            if together.first:
                self._remove_unfinished()  # the room is needed
            if not isinstance(error, StorageError):
                raise
            back = "begins anew" if self.last is None else f"goes on from step {self.last}"
            raise StorageError(
                error.culprit, f"{error.cure}; then the same command {back}"
            ) from error

    def _parts(self, state: TrainState) -> _Parts:
        """Folder in a step -> its arrays, layer by layer; without folders that would be empty."""
        return {
            item: (part for x, names in arrays for part in layers_of(x, names))
            for item, arrays in self._step_files.stored(state).items()
            if arrays
        }

    def _write(
        self,
        step: int,
        parts: _Parts,
        place: Mapping[str, Any],
        together: Group,
        *,
        beside: bool = False,
    ) -> bool:
        """Write a step aside, and give it its name when it is whole.

        Args:
          parts: without frozen parameters, if those of a step before have to be shared.

        Returns whether it was written: not if frozen parameters are missing, which are damaged in
        the step before.
        """
        work = self._aside(step)

        def write() -> None:
            for item, arrays in parts.items():
                if not (item == FROZEN and shared):
                    write_arrays(work, item, arrays, beside=beside)

        def finish() -> None:
            (work / PLACE).parent.mkdir()
            (work / PLACE).write_text(json.dumps(dict(place)), "utf-8")
            self._write_side_files(work)
            sync_tree(work)
            os.rename(work, self.path(step))
            sync(self.folder)
            self.remove_old()

        together.by_first(work.mkdir)
        shared = together.by_first_for_all(partial(self._share_frozen, work))
        if self._frozen is not None and not shared:
            self._frozen = None
            if FROZEN not in parts:
                together.by_first(self._remove_unfinished)
                return False
        together.gather(write)
        together.by_first(finish)
        if shared or FROZEN in parts:
            self._frozen = step
        return True

    def _share_frozen(self, work: Path) -> bool:
        """Whether the new step has the frozen parameters of one before: not where that one is
        damaged or gone."""
        if self._frozen is None:
            return False
        before = self.path(self._frozen)
        try:
            check_arrays(before, FROZEN)
        except InfiniteVLError as error:
            _log.warning("%s\n  the frozen parameters are written again", error.culprit)
            return False
        share_arrays(before, FROZEN, work)
        return True

    def restore(self, state: TrainState, accept: Callable[[dict[str, Any]], None]) -> TrainState:
        """The newest checkpoint that can be read, as arrays of the shapes and shardings of `state`.

        Newer ones that a process cannot read are moved to RUN/damaged-step-N, with a warning in the
        log.

        Args:
          state: a TrainState of jax.ShapeDtypeStruct with shardings.
          accept: takes the place in the data. Its InfiniteVLError is raised; any other error makes
            the checkpoint one that cannot be read.

        Raises InfiniteVLError, for the newest, if none can be read: damaged, or of another model or
          choice of trainable parameters.
        """
        unusable: dict[int, InfiniteVLError] = {}
        for step in self._together.told(self.steps):
            found: list[TrainState] = []

            def read(step: int = step, found: list = found) -> list | None:
                try:
                    files, cure = self._step_files, self._instead_of(step)
                    found.append(files.read(self.path(step), state, accept, cure))
                except Unusable as error:
                    return [error.culprit, error.cure, error.items]
                return None

            if reasons := self._together.gather(read):
                found.clear()
                unusable[step] = InfiniteVLError(*next(iter(reasons.values())))
                continue
            self._together.by_first(partial(self._go_back, step, unusable))
            if self._together.by_first_for_all(
                partial(self._step_files.shares_frozen, self.path(step), state)
            ):
                self._frozen = step
            return found[0]
        raise next(iter(unusable.values()))

    def _go_back(self, step: int, unusable: Mapping[int, InfiniteVLError]) -> None:
        """Keep the steps that cannot be read aside, and complete the one that was read."""
        for bad, error in unusable.items():
            with storage(self.path(bad)):
                kept = keep_aside(self.path(bad), self.folder.with_name(f"damaged-step-{bad}"))
            _log.warning("%s\n  kept as %s; going back to step %d", error.culprit, kept, step)
        with storage(self.path(step)):
            self._write_side_files(self.path(step))  # a run killed at the wrong moment lacks them

    def _instead_of(self, step: int) -> str:
        before = [other for other in self.steps if other < step]
        return (
            f"remove it to go on from step {before[0]}"
            if before
            else "put a copy of it there, or choose another train.output"
        )

    def _write_side_files(self, folder: Path) -> None:
        """Configuration, processor and, last, the manifest: each appears whole, whatever was
        there."""
        aside = folder / ".side-files"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        copy_side_files(self.files, aside)
        self.manifest.write(aside, format=2 if is_format_2(folder, PARAMS) else FORMAT)
        sync_tree(aside)
        for name in [*side_files(aside), Path(MANIFEST)]:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(aside / name, folder / name)
            sync((folder / name).parent)
        shutil.rmtree(aside)
        sync(self.folder)

    def _aside(self, step: int) -> Path:
        """Where a step lies that is being written or removed."""
        return self.folder / f".{step}.partial"

    def remove_old(self) -> None:
        """Remove the steps that are not to be kept. The first process calls it."""
        best = self.best(self.steps)
        for old in self.steps[self.keep :]:
            if old != best:
                self._remove(old)

    def _remove(self, step: int) -> None:
        os.rename(self.path(step), self._aside(step))  # half of it would pass for a step
        shutil.rmtree(self._aside(step))

    def _remove_unfinished(self) -> None:
        """Remove what a killed or failed save left, of this version or one before."""
        for pattern in (".*.partial", "*.orbax-checkpoint-tmp*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def _check_steps(self) -> None:
        """What is called like a step has to be a folder: a save would wait for a pipe of that
        name."""
        for path in self.folder.glob("*"):
            if path.name.isdigit() and not path.is_dir():
                raise InfiniteVLError(
                    f"{path} is not a folder", "remove it, or choose another train.output"
                )

    def _check_room(self, state: TrainState) -> None:
        if self._frozen is not None:
            state = state._replace(frozen={})

        def check() -> None:
            needed, free = (
                sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
                shutil.disk_usage(self.folder).free,
            )
            if free < needed:
                raise StorageError(
                    f"no space left for a checkpoint of {megabytes(needed)} in {self.folder}, where"
                    f" {megabytes(free)} are free",
                    "free some space",
                )

        self._together.by_first(check)


def _succeeded(writing: futures.Future) -> bool:
    return writing.exception() is None and writing.result()


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes with the places where the arrays shall live."""

    def leaf(x, sharding: NamedSharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state, shardings)
