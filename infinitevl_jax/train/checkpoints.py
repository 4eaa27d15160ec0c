"""A run's checkpoints: RUN/checkpoints/STEP, each at the same time one of our checkpoint folders.

STEP/params holds all parameters, STEP/optimizer the moments and counters, both layer by layer
whatever the run scans; STEP/data/metadata is the place in the data. Beside them lie config.json,
the processor's files and the manifest, so that STEP can be exported, or opened with
`InfiniteVL.from_pretrained`.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from infinitevl_jax.checkpoints.array_reader import ArrayReader, is_format_2
from infinitevl_jax.checkpoints.array_writer import layers_of, write_arrays
from infinitevl_jax.checkpoints.dtypes import FLOATS
from infinitevl_jax.checkpoints.files import MANIFEST, PARAMS, copy_side_files, side_files
from infinitevl_jax.checkpoints.format2 import StackReader
from infinitevl_jax.checkpoints.manifest import FORMAT, Manifest
from infinitevl_jax.checkpoints.placing import place
from infinitevl_jax.checkpoints.reading import read_config
from infinitevl_jax.checkpoints.stored import Reader, read_stack
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processes.group import group
from infinitevl_jax.reading import check_regular, read_json
from infinitevl_jax.train.step import TrainState
from infinitevl_jax.writing import (
    StorageError,
    failure,
    keep_aside,
    megabytes,
    storage,
    sync,
    sync_tree,
)

_log = logging.getLogger(__name__)
_OPTIMIZER, _PLACE = "optimizer", Path("data", "metadata")
_STEP = re.compile(r"0|[1-9][0-9]*")


class _Unusable(InfiniteVLError):
    """A checkpoint that is damaged, or of another configuration."""


class _Refused(InfiniteVLError):
    """A sound checkpoint whose place in the data does not suit."""


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
        self.keep, self.layers = keep, layers or {}
        self._together = group()
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
        step = int(state.step)
        if step != self._together.told([self.last])[0]:
            try:
                with storage(f"checkpoint {self.path(step)}"):
                    self._together.by_first(lambda: self._check_room(state))
                    self._write(step, state, place)
            except InfiniteVLError as error:  # here, or in another process
                if self._together.first:
                    self._remove_unfinished()  # the room is needed
                if not isinstance(error, StorageError):
                    raise
                back = "begins anew" if self.last is None else f"goes on from step {self.last}"
                raise StorageError(
                    error.culprit, f"{error.cure}; then the same command {back}"
                ) from error
            self._together.by_first(self.remove_old)
        return self.path(step)

    def _write(self, step: int, state: TrainState, place: Mapping[str, Any]) -> None:
        """Write a step aside, and give it its name when it is whole."""
        work = self._aside(step)

        def write() -> None:
            for item, stored in self._stored(state).items():
                parts = (part for x, names in stored for part in layers_of(x, names))
                write_arrays(work, item, parts)

        def finish() -> None:
            (work / _PLACE).parent.mkdir()
            (work / _PLACE).write_text(json.dumps(dict(place)), "utf-8")
            self._write_side_files(work)
            sync_tree(work)
            os.rename(work, self.path(step))
            sync(self.folder)

        self._together.by_first(work.mkdir)
        self._together.gather(write)
        self._together.by_first(finish)

    def _stored(self, state: TrainState) -> dict[str, list[tuple[Any, tuple[str, ...]]]]:
        """Folder in a step -> its arrays (or their shapes), with their names on disk."""
        params = {**state.trainable, **state.frozen}
        leaves = jax.tree_util.tree_leaves_with_path(state.optimizer)
        optimizer = [(x, self._names(path)) for path, x in leaves]
        return {
            PARAMS: [(x, tuple(self.layers.get(name, [name]))) for name, x in params.items()],
            _OPTIMIZER: [*optimizer, (state.step, ("step",))],
        }

    def _names(self, path: tuple) -> tuple[str, ...]:
        """Names on disk of a leaf of the optimizer's state: the moments of a parameter are called
        as the parameter, after what they are."""
        name = "state." + jax.tree_util.keystr(path, simple=True, separator=".")
        param = str(getattr(path[-1], "key", ""))
        return tuple(name.removesuffix(param) + layer for layer in self.layers.get(param, [param]))

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
                    found.append(self._read(step, state, accept))
                except _Unusable as error:
                    return [error.culprit, error.cure, error.items]
                return None

            if reasons := self._together.gather(read):
                found.clear()
                unusable[step] = InfiniteVLError(*next(iter(reasons.values())))
                continue
            self._together.by_first(partial(self._go_back, step, unusable))
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

    def _read(
        self, step: int, state: TrainState, accept: Callable[[dict[str, Any]], None]
    ) -> TrainState:
        """A step's checkpoint. Raises _Unusable."""
        try:
            check_regular(self.path(step))
            params, optimizer = (self._open(step, item) for item in (PARAMS, _OPTIMIZER))
            state = self._as_frozen(state, params)
            stored = self._stored(state)
            if wrong := _differences(params, stored[PARAMS]):
                more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
                raise _Unusable(
                    f"checkpoint {self.path(step)} is of another configuration:",
                    "go on with the configuration that it was made with, or choose another"
                    " train.output",
                    [*wrong[:5], *more],
                )
            if wrong := _differences(optimizer, stored[_OPTIMIZER]):
                raise ValueError(wrong[0])
            found = int(optimizer.read("step"))
            if found != step:
                raise ValueError(f"it holds step {found}")
            place = read_json(self.path(step) / _PLACE)
            try:
                accept(place)
            except InfiniteVLError as error:
                raise _Refused(error.culprit, error.cure, error.items) from error
            arrays = [
                _load(reader, x, names)
                for reader, item in ((params, PARAMS), (optimizer, _OPTIMIZER))
                for x, names in stored[item]
            ]
            names = [*state.trainable, *state.frozen]
            values = dict(zip(names, arrays, strict=False))
            trainable, frozen = (
                {name: values[name] for name in part} for part in (state.trainable, state.frozen)
            )
            moments = jax.tree.unflatten(
                jax.tree.structure(state.optimizer), arrays[len(names) : -1]
            )
            return TrainState(trainable, frozen, moments, arrays[-1])
        except (_Unusable, _Refused, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except InfiniteVLError as error:
            reason = error.culprit
        except Exception as error:  # what `accept` makes of a damaged place
            reason = failure("", error).culprit.removeprefix(": ")
        # here the arrays that were read so far are gone: the step before needs their memory
        raise _Unusable(
            f"checkpoint {self.path(step)} is damaged, or of another choice of trainable"
            f" parameters: {reason}",
            self._instead_of(step),
        )

    def _as_frozen(self, state: TrainState, params: Reader) -> TrainState:
        """`state` with its frozen parameters in the dtypes that they were stored in: a run keeps
        those that they came with."""

        def leaf(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            kinds = {params.dtypes.get(layer) for layer in self.layers.get(name, [name])}
            kind = kinds.pop() if len(kinds) == 1 else None
            return jax.ShapeDtypeStruct(
                x.shape, kind if kind in FLOATS else x.dtype, sharding=x.sharding
            )

        return state._replace(frozen={name: leaf(name, x) for name, x in state.frozen.items()})

    def _open(self, step: int, item: str) -> Reader:
        reader = ArrayReader(self.path(step), item)
        if not is_format_2(self.path(step), item):
            return reader
        return StackReader(reader, read_config(self.files))

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


def _differences(
    reader: Reader, wanted: Sequence[tuple[jax.ShapeDtypeStruct, Sequence[str]]]
) -> list[str]:
    """Names, shapes and dtypes in which a checkpoint is not what is wanted, a line each."""
    here = {}
    for x, names in wanted:
        shape = x.shape if len(names) == 1 else x.shape[1:]
        here |= dict.fromkeys(names, (tuple(shape), np.dtype(x.dtype)))
    there = {name: (shape, reader.dtypes[name]) for name, shape in reader.shapes.items()}
    lines = [f"{name} is missing there" for name in here if name not in there]
    lines += [f"{name} is unknown here" for name in there if name not in here]
    lines += [
        f"{name} is {there[name][0]} {there[name][1]} there, {shape} {dtype} here"
        for name, (shape, dtype) in here.items()
        if name in there and there[name] != (shape, dtype)
    ]
    return lines


def _load(reader: Reader, x: jax.ShapeDtypeStruct, names: Sequence[str]) -> jax.Array:
    read = partial(read_stack, reader, names, x.shape, np.dtype(x.dtype))
    return place(x.shape, x.sharding, read, whole=True)


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes with the places where the arrays shall live."""

    def leaf(x, sharding: NamedSharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state, shardings)
