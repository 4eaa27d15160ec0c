"""Sharding rules: logical axis -> mesh axes.

Mesh axes: `data` (model replicas), `fsdp` (batch and parameters), `tensor` (heads and hidden
units), `context` (sequence; reserved). A dimension is replicated if the mesh lacks its axis or the
axis does not divide it. Parameters carry their logical axes (`infinitevl_jax.nn.parameter`).
"""

import math
from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from infinitevl_jax.errors import InfiniteVLError
from pallas_kernels.partition import OperatorMesh

# logical axis -> mesh axes that shard it
AXES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
    "width": ("fsdp",),
    None: (),
}


def check_mesh(mesh: Mesh) -> None:
    """Raise InfiniteVLError for a mesh with unknown or explicit axes.

    Dimensions on an unknown axis would silently be replicated.
    """
    known = sorted({name for names in AXES.values() for name in names})
    if unknown := [name for name in mesh.axis_names if name not in known]:
        raise InfiniteVLError(
            f"mesh axis {unknown[0]!r} is unknown",
            f"name the axes among {', '.join(known)}, or use sharding.make_mesh",
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise InfiniteVLError(
            "the mesh has explicit axes, the model leaves sharding to the compiler",
            "make it with axis_types=(jax.sharding.AxisType.Auto,) * axes, or use"
            " sharding.make_mesh",
        )


def operator_mesh(mesh: Mesh) -> OperatorMesh:
    """Mesh axes of the batch and heads, for the operators."""
    return OperatorMesh(mesh, AXES["batch"], AXES["heads"])


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """PartitionSpec of an array with these logical axes."""
    used: set[str] = set()
    entries: list[tuple[str, ...] | None] = []
    for axis, size in zip(axes, shape, strict=True):
        names = [name for name in AXES[axis] if mesh.shape.get(name, 1) > 1]
        if clash := used & set(names):
            raise InfiniteVLError(
                f"logical axes {axes} put mesh axis {sorted(clash)[0]!r} on two dimensions",
                "give the dimensions different logical axes",
            )
        split = 1
        for name in names:
            split *= mesh.shape[name]
        fits = bool(names) and size % split == 0
        used |= set(names) if fits else set()
        entries.append(tuple(names) if fits else None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrain an activation's sharding on the ambient mesh (`jax.set_mesh`), if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def to_host(x: jax.Array) -> np.ndarray:
    """The whole of an array, also where other processes hold parts of it: all call this then."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        assert isinstance(x.sharding, NamedSharding)
        everywhere = NamedSharding(x.sharding.mesh, PartitionSpec())
        x = jax.jit(lambda x: x, out_shardings=everywhere)(x)
    return np.asarray(x)


def batch_parts() -> int:
    """Number of shards of a batch on the ambient mesh (`jax.set_mesh`); 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(name, 1) for name in AXES["batch"])


class Sharded(Protocol):
    """Shape and logical axes of a parameter, such as `infinitevl_jax.nn.params.Parameter`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def axes(self) -> tuple[str | None, ...]: ...


def kept_whole(parameters: Mapping[str, Sharded], mesh: Mesh) -> list[str]:
    """One line for each matrix that is replicated because no dimension divides."""
    lines = []
    for name, parameter in parameters.items():
        parts = {
            axis: mesh.shape[axis]
            for logical in parameter.axes
            for axis in AXES[logical]
            if mesh.shape.get(axis, 1) > 1
        }
        matrix = sum(axis is not None for axis in parameter.axes) > 1
        if parts and matrix and not any(spec(parameter.axes, parameter.shape, mesh)):
            tried = " or ".join(f"{axis} {size}" for axis, size in parts.items())
            lines.append(f"{name} {list(parameter.shape)}: no side divides by {tried}")
    return lines


def parameter_shardings(parameters: Mapping[str, Sharded], mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every parameter by name (`infinitevl_jax.nn.params.parameters`)."""
    return {
        name: NamedSharding(mesh, spec(parameter.axes, parameter.shape, mesh))
        for name, parameter in parameters.items()
    }
