"""The parameters of one of our folders, as they are stored: layer by layer, whatever its format."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from infinitevl_jax.checkpoints.adapted import AdaptedReader
from infinitevl_jax.checkpoints.array_reader import ArrayReader, is_format_2
from infinitevl_jax.checkpoints.checksums import checksum_files
from infinitevl_jax.checkpoints.dtypes import FLOATS
from infinitevl_jax.checkpoints.files import FROZEN, PARAMS
from infinitevl_jax.checkpoints.format2 import StackReader
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.weights import complain, leaves
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError


class Reader(Protocol):
    """ArrayReader, JoinedReader, AdaptedReader or StackReader."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray: ...


class JoinedReader:
    """Arrays that lie in two folders, as if they were in the first."""

    def __init__(self, first: ArrayReader, second: ArrayReader):
        """
        Raises:
          InfiniteVLError: an array is in both.
        """
        self.path = first.path
        if twice := first.shapes.keys() & second.shapes.keys():
            raise InfiniteVLError(
                f"{min(twice)} is in {first.path} and in {second.path}",
                "the checkpoint is damaged: copy it again",
            )
        self.shapes, self.dtypes = first.shapes | second.shapes, first.dtypes | second.dtypes
        self._first, self._second = first, second

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """array[index], or all of it."""
        reader = self._first if name in self._first.shapes else self._second
        return reader.read(name, index)


def open_arrays(folder: Path) -> ArrayReader | JoinedReader:
    """All parameters of a folder as they lie there, those that do not train among them."""
    params = ArrayReader(folder, PARAMS)
    if (folder / FROZEN).is_dir() or checksum_files(folder, FROZEN):
        return JoinedReader(params, ArrayReader(folder, FROZEN))
    return params


def open_params(folder: Path, config: ModelConfig, *, merge: bool = True) -> Reader:
    """The parameters of a folder, checked against its configuration.

    Args:
      merge: add the adapters of a LoRA run to their kernels; else they are left out.

    Raises:
      InfiniteVLError: damaged, missing, extra or misshapen arrays, or such as are no weights.
    """
    reader: Reader = open_arrays(folder)
    stored = leaves(config, scanned=False)
    if strange := [name for name, dtype in reader.dtypes.items() if dtype not in FLOATS]:
        raise InfiniteVLError(
            f"{reader.path}: {strange[0]} is {reader.dtypes[strange[0]]}",
            "weights are bf16, f16 or f32: import or save the model again",
        )
    manifest = Manifest.read(folder)
    if manifest.lora:
        reader = AdaptedReader(reader, manifest.lora, merge=merge)
    if is_format_2(folder, PARAMS):
        source = manifest.dtypes
        own = {leaf.name: source[leaf.torch[0]] for leaf in stored if leaf.torch[0] in source}
        reader = StackReader(reader, config, own)
    expected = {leaf.name: leaf.shape for leaf in stored}
    complain(expected, reader.shapes, str(reader.path), str(folder / "config.json"))
    return reader


def read_stack(
    reader: Reader,
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: np.dtype,
    index: tuple[slice, ...] | None = None,
    convert: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value,
) -> np.ndarray:
    """An array of the model, or array[index] of it, with steps of 1.

    Args:
      names: on disk: of the layers along its leading axis, or its own.
      shape, dtype: of the array.
      convert: checks what was read of one of them, and brings it into `dtype`.
    """
    index = tuple(
        slice(*part.indices(size)[:2])
        for part, size in zip(index or [slice(None)] * len(shape), shape, strict=True)
    )
    if len(shape) == len(reader.shapes[names[0]]):
        return convert(names[0], reader.read(names[0], index))
    out = np.empty([part.stop - part.start for part in index], dtype)
    for layer, name in zip(out, names[index[0]], strict=True):
        layer[...] = convert(name, reader.read(name, index[1:]))
    return out
