"""A run's checkpoints: RUN/checkpoints/STEP, each at the same time one of our checkpoint folders.

STEP/params is the flat dict of all parameters, STEP/optimizer the moments and counters, STEP/data
the place in the data. Beside them lie config.json, the processor's files and the manifest, so that
STEP can be exported, or opened with `InfiniteVL.from_pretrained`.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from infinitevl_jax.checkpoints.files import MANIFEST, copy_side_files, side_files
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import check_regular
from infinitevl_jax.train.quiet import report_once
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


class _Unusable(InfiniteVLError):
    """A checkpoint that is damaged, or of another configuration."""


class Checkpoints:
    """Writes and reads them; keeps the newest `keep`."""

    def __init__(
        self,
        run: Path,
        files: Path,
        manifest: Manifest,
        keep: int,
        say: Callable[[str], None] = print,
    ):
        """
        Args:
          run: the run's folder.
          files: a folder with the model's side files. manifest: what export needs to know beside
            them.
          say: told which steps could not be used.
        """
        self.folder, self.files, self.manifest = run.absolute() / "checkpoints", files, manifest
        self.keep, self.say = keep, say
        report_once()
        # Older steps are removed here, once the new one is on the disk.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None, enable_async_checkpointing=False, create=True
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
        }
        handlers["data"] = ocp.JsonCheckpointHandler()
        with storage(self.folder):
            self._remove_unfinished()
            self._check_steps()
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )

    @property
    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, the newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    @property
    def last(self) -> int | None:
        """The newest checkpoint's step, None if there is none."""
        return next(iter(self.steps), None)

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / str(step)

    def save(self, state: TrainState, place: Mapping[str, Any]) -> Path:
        """Write the state after a step, and `place` (JSON) in the data; on the disk and whole when
        this returns.

        Raises StorageError, which names the step to go back to, if it cannot be written.
        """
        step = int(state.step)
        if step != self.last:
            items = ocp.args.Composite(
                params=ocp.args.StandardSave({**state.trainable, **state.frozen}),
                optimizer=ocp.args.StandardSave({"state": state.optimizer, "step": state.step}),
                data=ocp.args.JsonSave(dict(place)),
            )
            try:
                with storage(f"checkpoint {self.path(step)}"):
                    self._check_room(state)
                    self._manager.save(step, args=items, force=True)
                    self._manager.wait_until_finished()
                    sync_tree(self.path(step))
                    self._write_side_files(self.path(step))
            except StorageError as error:
                self._remove_unfinished()  # the room is needed
                self._manager.reload()
                back = "begins anew" if self.last is None else f"goes on from step {self.last}"
                raise StorageError(
                    error.culprit, f"{error.cure}; then the same command {back}"
                ) from error
            for old in self.steps[self.keep :]:
                self._manager.delete(old)
        return self.path(step)

    def restore(self, state: TrainState, accept: Callable[[dict[str, Any]], None]) -> TrainState:
        """The newest checkpoint that can be read, as arrays of the shapes and shardings of `state`.

        Newer ones that cannot be read are moved to RUN/damaged-step-N, and `say` is told.

        Args:
          state: a TrainState of jax.ShapeDtypeStruct with shardings.
          accept: takes the place in the data; what it raises makes the checkpoint one that cannot
            be read.

        Raises InfiniteVLError, for the newest, if none can be read: damaged, or of another model or
          choice of trainable parameters.
        """
        unusable: dict[int, InfiniteVLError] = {}
        for step in self.steps:
            try:
                found = self._read(step, state, accept)
            except _Unusable as error:
                unusable[step] = InfiniteVLError(error.culprit, error.cure, error.items)
                continue
            for bad, error in unusable.items():
                with storage(self.path(bad)):
                    kept = keep_aside(self.path(bad), self.folder.with_name(f"damaged-step-{bad}"))
                self.say(f"{error.culprit}\n  kept as {kept}; going back to step {step}")
            if unusable:
                self._manager.reload()
            with storage(self.path(step)):
                # a run killed at the wrong moment lacks them
                self._write_side_files(self.path(step))
            return found
        raise next(iter(unusable.values()))

    def _read(
        self, step: int, state: TrainState, accept: Callable[[dict[str, Any]], None]
    ) -> TrainState:
        """A step's checkpoint. Raises _Unusable."""
        wanted = {**state.trainable, **state.frozen}
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(wanted),
            optimizer=ocp.args.StandardRestore({"state": state.optimizer, "step": state.step}),
            data=ocp.args.JsonRestore(),
        )
        try:
            check_regular(self.path(step))
            self._check(step, wanted)
            found = self._manager.restore(step, args=items)
            params, optimizer = found["params"], found["optimizer"]
            trainable, frozen = (
                {name: params[name] for name in names} for names in (state.trainable, state.frozen)
            )
            if int(optimizer["step"]) != step:
                raise ValueError(f"it holds step {int(optimizer['step'])}")
            accept(found["data"])
            return TrainState(trainable, frozen, optimizer["state"], optimizer["step"])
        except (_Unusable, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except (
            Exception
        ) as error:  # orbax, tensorstore and JSON raise what they like, bare Exception included
            reason = failure("", error).culprit.removeprefix(": ")
        # here the arrays that were read so far are gone: the step before needs their memory
        raise _Unusable(
            f"checkpoint {self.path(step)} is damaged, or of another choice of trainable"
            f" parameters: {reason}",
            self._instead_of(step),
        )

    def _instead_of(self, step: int) -> str:
        before = [other for other in self.steps if other < step]
        return (
            f"remove it to go on from step {before[0]}"
            if before
            else "put a copy of it there, or choose another train.output"
        )

    def close(self) -> None:
        """Release the manager's threads."""
        self._manager.close()

    def _check(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Compare names, shapes and dtypes with what is stored, and say what differs."""
        params = dict(self._manager.item_metadata(step)["params"].items())
        wrong = [f"{name} is missing there" for name in wanted if name not in params]
        wrong += [f"{name} is unknown here" for name in params if name not in wanted]
        for name, here in wanted.items():
            there = params.get(name)
            if there is not None and (tuple(there.shape), str(there.dtype)) != (
                here.shape,
                str(here.dtype),
            ):
                wrong.append(
                    f"{name} is {tuple(there.shape)} {there.dtype} there, {here.shape} {here.dtype}"
                    " here"
                )
        if wrong:
            more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
            raise _Unusable(
                f"checkpoint {self.path(step)} is of another configuration:",
                "go on with the configuration that it was made with, or choose another"
                " train.output",
                [*wrong[:5], *more],
            )

    def _write_side_files(self, folder: Path) -> None:
        """Configuration, processor and, last, the manifest: each appears whole, whatever was
        there."""
        aside = folder / ".side-files"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        copy_side_files(self.files, aside)
        self.manifest.write(aside)
        sync_tree(aside)
        for name in [*side_files(aside), Path(MANIFEST)]:
            (folder / name).parent.mkdir(exist_ok=True)
            os.replace(aside / name, folder / name)
            sync((folder / name).parent)
        shutil.rmtree(aside)
        sync(self.folder)

    def _remove_unfinished(self) -> None:
        """Remove what a killed or failed save left. Threads of a failed one may still write for a
        moment."""
        for _ in range(20):
            left = list(self.folder.glob("*.orbax-checkpoint-tmp*"))
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            if not left:
                return
            time.sleep(0.1)

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


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes with the places where the arrays shall live."""

    def leaf(x, sharding: NamedSharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state, shardings)
