"""Operators on a mesh: each device runs an operator on its own rows and heads.

The compiler cannot split a Pallas kernel. Each operator's `partition.py` therefore says, by
`jax.shard_map`, which part of its arrays a device takes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

Axes = tuple[str, ...] | None
"""Axes of a mesh that split a dimension. None: it is replicated."""


@dataclass(frozen=True)
class OperatorMesh:
    """A mesh, the axes of it that split the batch, and those that split the heads.

    An axis that the mesh lacks is left out. A dimension that the axes do not divide is replicated.
    """

    mesh: Mesh
    batch_axes: tuple[str, ...]
    head_axes: tuple[str, ...]

    def rows(self, batch: int) -> Axes:
        """The axes that split this many sequences."""
        # Axes of size 1 are named too: gradients are summed over axes that are not named.
        alone = tuple(name for name, size in self.mesh.shape.items() if size == 1)
        return (*(self._split(self.batch_axes, batch) or ()), *alone) or None

    def heads(self, *counts: int) -> Axes:
        """The axes that split all of these numbers of heads."""
        splits = {self._split(self.head_axes, count) for count in counts}
        return splits.pop() if len(splits) == 1 else None

    @property
    def head_shards(self) -> int:
        return math.prod(self.mesh.shape.get(name, 1) for name in self.head_axes)

    def head_shard(self) -> Array:
        """Inside `shard_map`: the number of this device's part of the heads."""
        return lax.axis_index(tuple(name for name in self.head_axes if name in self.mesh.shape))

    def shard_map(self, local: Callable, in_specs, out_specs) -> Callable:
        """`local` on each device's parts."""
        return jax.shard_map(
            local, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def run(
        self,
        operator: Callable,
        arguments: dict[str, tuple[Array | None, PartitionSpec]],
        out_specs,
    ):
        """`operator(**arguments)`. Each argument is an array with its PartitionSpec; None is left
        out."""
        given = {name: pair for name, pair in arguments.items() if pair[0] is not None}
        arrays, specs = zip(*given.values(), strict=True)

        def local(*parts):
            return operator(**dict(zip(given, parts, strict=True)))

        return self.shard_map(local, specs, out_specs)(*arrays)

    def _split(self, names: tuple[str, ...], size: int) -> Axes:
        used = tuple(name for name in names if self.mesh.shape.get(name, 1) > 1)
        return used if used and size % math.prod(self.mesh.shape[n] for n in used) == 0 else None
