"""The parameters of a LoRA run, read with the adapters added to their kernels."""

from typing import TYPE_CHECKING

import numpy as np

from infinitevl_jax.checkpoints.manifest import Lora
from infinitevl_jax.checkpoints.weights import complain
from infinitevl_jax.nn.lora import A, B, is_adapter

if TYPE_CHECKING:
    from infinitevl_jax.checkpoints.stored import Reader


class AdaptedReader:
    """Kernels as W + scale A B, in float32, cast to W's dtype once; or as W.

    Attributes:
      path: of the arrays.
      shapes, dtypes: by name, without the adapters.
      adapted: names of the layers that have an adapter.
    """

    def __init__(self, reader: "Reader", lora: Lora, *, merge: bool):
        """
        Raises:
          InfiniteVLError: half an adapter, or one of another shape than its kernel or rank.
        """
        self._reader, self._lora, self._merge = reader, lora, merge
        self.path = reader.path
        found = {name: shape for name, shape in reader.shapes.items() if is_adapter(name)}
        self.shapes = {n: shape for n, shape in reader.shapes.items() if n not in found}
        self.dtypes = {name: reader.dtypes[name] for name in self.shapes}
        self.adapted = tuple(dict.fromkeys(name.rpartition(".")[0] for name in found))
        expected = {}
        for module in self.adapted:
            if len(shape := self.shapes.get(f"{module}.kernel", ())) == 2:
                expected[f"{module}.{A}"] = (shape[0], lora.rank)
                expected[f"{module}.{B}"] = (lora.rank, shape[1])
        complain(expected, found, str(reader.path), f"adapters of rank {lora.rank}")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """array[index], or all of it."""
        value = self._reader.read(name, index)
        module, _, own = name.rpartition(".")
        if not self._merge or own != "kernel" or module not in self.adapted:
            return value
        rows, columns = index or (slice(None), slice(None))
        a = self._reader.read(f"{module}.{A}", (rows, slice(None)))
        b = self._reader.read(f"{module}.{B}", (slice(None), columns))
        with np.errstate(over="ignore", invalid="ignore"):  # readers look for what is not finite
            added = np.float32(self._lora.scale) * (a.astype(np.float32) @ b.astype(np.float32))
            return (value.astype(np.float32) + added).astype(value.dtype)

    def side(self, module: str, side: str) -> np.ndarray:
        """One of a layer's two matrices."""
        return self._reader.read(f"{module}.{side}")
