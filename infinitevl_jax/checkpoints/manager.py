"""A run's checkpoints: RUN/checkpoints/STEP, each at the same time one of our checkpoint folders.

STEP/params is the flat dict of all parameters, STEP/optimizer the moments and counters, STEP/data the place in the data. Beside them lie
config.json, the processor's files and the manifest, so that STEP can be exported, or opened with `InfiniteVL.from_pretrained`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

from infinitevl_jax.conversion.files import MANIFEST, copy_side_files
from infinitevl_jax.conversion.manifest import Manifest
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.training.step import TrainState


class Checkpoints:
    """Writes and reads them; keeps the newest `keep`."""

    def __init__(self, run: Path, files: Path, manifest: Manifest, keep: int):
        """
        Args:
          run: the run's folder.
          files: a folder with the model's side files. manifest: what export needs to know beside them.
        """
        self.folder, self.files, self.manifest = run.absolute() / "checkpoints", files, manifest
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False, create=True)
        handlers = {"params": ocp.StandardCheckpointHandler(), "optimizer": ocp.StandardCheckpointHandler()}
        handlers["data"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def last(self) -> int | None:
        """The newest whole checkpoint's step, None if there is none."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / str(step)

    def save(self, state: TrainState, place: Mapping[str, Any]) -> Path:
        """Write the state after a step, and `place` (JSON) in the data. The folder appears whole, then gets its side files."""
        step = int(state.step)
        if step != self.last:
            items = ocp.args.Composite(
                params=ocp.args.StandardSave({**state.trainable, **state.frozen}),
                optimizer=ocp.args.StandardSave({"state": state.optimizer, "step": state.step}),
                data=ocp.args.JsonSave(dict(place)),
            )
            self._manager.save(step, args=items)
            self._manager.wait_until_finished()
        self._add_side_files(self.path(step))
        return self.path(step)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint as arrays of the shapes and shardings of `state`, and the place in the data.

        state: a TrainState of jax.ShapeDtypeStruct with shardings.
        Raises InfiniteVLError if what is stored is of another model, another choice of trainable parameters, or damaged.
        """
        step = self.last
        wanted = {**state.trainable, **state.frozen}
        self._check(step, wanted, state)
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(wanted),
            optimizer=ocp.args.StandardRestore({"state": state.optimizer, "step": state.step}),
            data=ocp.args.JsonRestore(),
        )
        try:
            found = self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise InfiniteVLError(
                f"checkpoint {self.path(step)} cannot be restored: {reason}", "remove that step's folder to go on from the one before it"
            ) from error
        self._add_side_files(self.path(step))  # a run killed at the wrong moment lacks them
        params = found["params"]
        restored = TrainState(
            {name: params[name] for name in state.trainable},
            {name: params[name] for name in state.frozen},
            found["optimizer"]["state"],
            found["optimizer"]["step"],
        )
        return restored, found["data"]

    def close(self) -> None:
        """Release the manager's threads."""
        self._manager.close()

    def _check(self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct], state: TrainState) -> None:
        """Compare names, shapes and dtypes with what is stored, and say what differs."""
        try:
            stored = self._manager.item_metadata(step)
            params = dict(stored["params"].items())
        except (ValueError, KeyError, OSError, AttributeError, TypeError) as error:
            raise InfiniteVLError(
                f"checkpoint {self.path(step)} is damaged: {type(error).__name__}",
                "remove that step's folder to go on from the one before it",
            ) from error
        wrong = [f"{name} is missing there" for name in wanted if name not in params]
        wrong += [f"{name} is unknown here" for name in params if name not in wanted]
        for name, here in wanted.items():
            there = params.get(name)
            if there is not None and (tuple(there.shape), str(there.dtype)) != (here.shape, str(here.dtype)):
                wrong.append(f"{name} is {tuple(there.shape)} {there.dtype} there, {here.shape} {here.dtype} here")
        if wrong:
            more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise InfiniteVLError(
                f"checkpoint {self.path(step)} is of another configuration:\n  " + "\n  ".join(wrong[:5]) + more,
                "go on with the configuration that it was made with, or choose another train.output",
            )

    def _add_side_files(self, folder: Path) -> None:
        if (folder / MANIFEST).exists():
            return
        copy_side_files(self.files, folder, skip=("_CHECKPOINT_METADATA",))
        self.manifest.write(folder)  # last: its presence says that the others are there


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes with the places where the arrays shall live."""

    def leaf(x, sharding: NamedSharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, state, shardings)
