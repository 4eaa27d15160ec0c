"""Checkpoints of format 2, which held equal layers stacked as a run scanned them: read as if they
were stored layer by layer."""

import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from infinitevl_jax.checkpoints.array_reader import ArrayReader
from infinitevl_jax.checkpoints.dtypes import common
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.nn.params import parameters, stack_layouts

_LAYER = re.compile(r"(layers|visual\.blocks)\.(\d+)\.(.+)")


class StackReader:
    """An ArrayReader of a folder of format 2.

    Attributes:
      path, shapes, dtypes: as those of ArrayReader, by the names of format 3. The layers of a stack
        follow each other: it is read once, and kept until another array is read.
    """

    def __init__(
        self,
        reader: ArrayReader,
        config: ModelConfig,
        source: Mapping[str, np.dtype] = MappingProxyType({}),
    ):
        """
        Args:
          source: name -> dtype of the parameter that was imported, where it was. A stack has one
            dtype, which is wider where its layers differed.
        """
        self.path, self._reader = reader.path, reader
        members: dict[str, list[tuple[str, int | None]]] = {}
        for name in parameters(config, scanned=False):
            stored, place = _place(name, config)
            members.setdefault(stored, []).append((name, place))
        self._places: dict[str, tuple[str, int | None]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        for stored, shape in reader.shapes.items():
            # The moments of a parameter are stored by its name, after a prefix.
            suffix = next((end for end in _endings(stored) if end in members), stored)
            found = members.get(suffix, [(suffix, None)])
            stacked = found[0][1] is not None
            if stacked and shape[0] != len(
                found
            ):  # of another model: its own name is complained of
                found, stacked = [(suffix, None)], False
            dtypes = [source.get(name, reader.dtypes[stored]) for name, _ in found]
            widened = common(dtypes) == reader.dtypes[stored]
            for (name, place), dtype in zip(found, dtypes, strict=True):
                name = stored.removesuffix(suffix) + name
                self._places[name] = (stored, place)
                self.shapes[name] = shape[1:] if stacked else shape
                self.dtypes[name] = dtype if widened else reader.dtypes[stored]
        self._kept: tuple[str, np.ndarray] | None = None

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """array[index] in the dtype that is stored. Format 2 has no checksums."""
        stored, place = self._places[name]
        if place is None:
            return self._reader.read(stored, index)
        if self._kept is None or self._kept[0] != stored:
            self._kept = None  # before the memory of the next one is needed
            self._kept = (stored, self._reader.read(stored))
        return self._kept[1][place][index]


def _place(name: str, config: ModelConfig) -> tuple[str, int | None]:
    """Where format 2 kept a parameter of format 3: name, and index along the leading axis (None
    where there is no such axis)."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return name, None
    stack, layer, tail = found.groups()
    group, number, place = stack_layouts(config, scanned=True)[stack].places()[int(layer)]
    return f"{stack}.{group}.{number}.{tail}", place


def _endings(name: str) -> list[str]:
    """`a.b.c` -> [a.b.c, b.c, c]."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
