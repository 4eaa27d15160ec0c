"""The arrays in a step's folder: their names, and the state that they make up.

STEP/params holds what trains, STEP/frozen the other parameters, STEP/optimizer the moments and
counters, all layer by layer whatever the run scans. Until format 4, STEP/params held all
parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infinitevl_jax.checkpoints.array_reader import ArrayReader, is_format_2
from infinitevl_jax.checkpoints.dtypes import FLOATS
from infinitevl_jax.checkpoints.files import FROZEN, PARAMS
from infinitevl_jax.checkpoints.format2 import StackReader
from infinitevl_jax.checkpoints.placing import place
from infinitevl_jax.checkpoints.reading import read_config
from infinitevl_jax.checkpoints.stored import Reader, open_arrays, read_stack
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import check_regular, read_json
from infinitevl_jax.train.step import TrainState
from infinitevl_jax.writing import failure

OPTIMIZER, PLACE = "optimizer", Path("data", "metadata")
Stored = list[tuple[Any, tuple[str, ...]]]  # arrays or their shapes, each with its names on disk


class Unusable(InfiniteVLError):
    """A checkpoint that is damaged, or of another configuration."""


class _Refused(InfiniteVLError):
    """A sound checkpoint whose place in the data does not suit."""


class StepFiles:
    """Names and reads them."""

    def __init__(self, files: Path, layers: Mapping[str, Sequence[str]]):
        """
        Args:
          files: a folder with the model's config.json.
          layers: name of a parameter of the state -> its names on disk: those of its layers, if it
            is a stack of them. A parameter that is not named here keeps its name.
        """
        self._files, self._layers = files, layers

    def stored(self, state: TrainState) -> dict[str, Stored]:
        """Folder in a step -> its arrays."""
        leaves = jax.tree_util.tree_leaves_with_path(state.optimizer)
        optimizer = [(x, self._moment_names(path)) for path, x in leaves]
        return {
            PARAMS: self._parameters(state.trainable),
            FROZEN: self._parameters(state.frozen),
            OPTIMIZER: [*optimizer, (state.step, ("step",))],
        }

    def _parameters(self, params: Mapping[str, Any]) -> Stored:
        return [(x, tuple(self._layers.get(name, [name]))) for name, x in params.items()]

    def _moment_names(self, path: tuple) -> tuple[str, ...]:
        """Names on disk of a leaf of the optimizer's state: the moments of a parameter are called
        as the parameter, after what they are."""
        name = "state." + jax.tree_util.keystr(path, simple=True, separator=".")
        param = str(getattr(path[-1], "key", ""))
        layers = self._layers.get(param, [param])
        return tuple(name.removesuffix(param) + layer for layer in layers)

    def read(
        self, folder: Path, state: TrainState, accept: Callable[[dict[str, Any]], None], cure: str
    ) -> TrainState:
        """The state in a step's folder, which is called like the step, as arrays of the shapes and
        shardings of `state`.

        Args:
          accept: takes the place in the data. Its InfiniteVLError is raised.
          cure: of a damaged step.

        Raises:
          Unusable: the step is damaged, or of another model or choice of trainable parameters.
        """
        try:
            check_regular(folder)
            params, optimizer = self._open_parameters(folder), self._open(folder, OPTIMIZER)
            state = self._as_frozen(state, params)
            stored = self.stored(state)
            if wrong := _differences(params, [*stored[PARAMS], *stored[FROZEN]]):
                more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
                raise Unusable(
                    f"checkpoint {folder} is of another configuration:",
                    "go on with the configuration that it was made with, or choose another"
                    " train.output",
                    [*wrong[:5], *more],
                )
            if wrong := _differences(optimizer, stored[OPTIMIZER]):
                raise ValueError(wrong[0])
            if (found := int(optimizer.read("step"))) != int(folder.name):
                raise ValueError(f"it holds step {found}")
            place = read_json(folder / PLACE)
            try:
                accept(place)
            except InfiniteVLError as error:
                raise _Refused(error.culprit, error.cure, error.items) from error
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                what = f"{type(error).__name__}: {error}"
                raise ValueError(f"{PLACE} is not a place in the data ({what})") from error
            trainable = _load_all(params, state.trainable, stored[PARAMS])
            frozen = _load_all(params, state.frozen, stored[FROZEN])
            *moments, step = [_load(optimizer, x, names) for x, names in stored[OPTIMIZER]]
            structure = jax.tree.structure(state.optimizer)
            return TrainState(trainable, frozen, jax.tree.unflatten(structure, moments), step)
        except (Unusable, _Refused, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except InfiniteVLError as error:
            reason = error.culprit
        except Exception as error:
            reason = failure("", error).culprit.removeprefix(": ")
        # here the arrays that were read so far are gone: the step before needs their memory
        raise Unusable(
            f"checkpoint {folder} is damaged, or of another choice of trainable parameters:"
            f" {reason}",
            cure,
        )

    def shares_frozen(self, folder: Path, state: TrainState) -> bool:
        """Whether the parameters of `state` that do not train are those in STEP/frozen."""
        names = {name for _, found in self.stored(state)[FROZEN] for name in found}
        return (
            bool(names)
            and (folder / FROZEN).is_dir()
            and names == set(ArrayReader(folder, FROZEN).shapes)
        )

    def _as_frozen(self, state: TrainState, params: Reader) -> TrainState:
        """`state` with its frozen parameters in the dtypes that they were stored in: a run keeps
        those that they came with."""

        def leaf(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            kinds = {params.dtypes.get(layer) for layer in self._layers.get(name, [name])}
            kind = kinds.pop() if len(kinds) == 1 else None
            return jax.ShapeDtypeStruct(
                x.shape, kind if kind in FLOATS else x.dtype, sharding=x.sharding
            )

        return state._replace(frozen={name: leaf(name, x) for name, x in state.frozen.items()})

    def _open_parameters(self, folder: Path) -> Reader:
        if is_format_2(folder, PARAMS):
            return self._open(folder, PARAMS)
        return open_arrays(folder)

    def _open(self, folder: Path, item: str) -> Reader:
        reader = ArrayReader(folder, item)
        if not is_format_2(folder, item):
            return reader
        return StackReader(reader, read_config(self._files))


def _differences(reader: Reader, wanted: Stored) -> list[str]:
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


def _load_all(reader: Reader, params: Mapping[str, Any], stored: Stored) -> dict[str, jax.Array]:
    arrays = (_load(reader, x, names) for x, names in stored)
    return dict(zip(params, arrays, strict=True))


def _load(reader: Reader, x: jax.ShapeDtypeStruct, names: Sequence[str]) -> jax.Array:
    read = partial(read_stack, reader, names, x.shape, np.dtype(x.dtype))
    return place(x.shape, x.sharding, read, whole=True)
