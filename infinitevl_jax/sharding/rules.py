"""Sharding, said once: logical axis -> mesh axes, and parameter name -> logical axes.

Mesh axes: `data` (replicas of the model), `fsdp` (batch and parameters), `tensor` (heads and hidden
  units), `context` (reserved for
the length). An axis that the mesh lacks, or that does not divide a dimension, leaves that dimension
whole.
"""

import re
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from infinitevl_jax.errors import InfiniteVLError
from pallas_kernels.partition import OperatorMesh

# logical axis -> mesh axes that split it
AXES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
    "width": ("fsdp",),
    None: (),
}

# parameter name -> logical axes of its last dimensions; stacked parameters carry one leading axis
# more, which stays whole
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens\.embedding", ("vocab", "width")),
    (r"lm_head\.kernel", ("width", "vocab")),
    (r"patch_embed\.kernel", ("hidden", "width")),
    (r"(q|k|v|a|b|g)_proj\.kernel|qkv\.kernel", ("width", "heads")),
    (r"(q|k|v)_proj\.bias|qkv\.bias", ("heads",)),
    (r"(o_proj|attn\.proj)\.kernel", ("heads", "width")),
    (r"(gate_proj|up_proj|fc1)\.kernel", ("width", "hidden")),
    (r"(gate_proj|up_proj|fc1)\.bias", ("hidden",)),
    (r"(down_proj|fc2)\.kernel", ("hidden", "width")),
    (r"(q|k|v)_conv1d\.weight", (None, "heads")),
    (r"A_log|dt_bias", ("heads",)),
    (r"(down_proj|fc2|proj)\.bias|weight", (None,)),
)


def check_mesh(mesh: Mesh) -> None:
    """Refuse a mesh that the rules cannot use: unknown axis names would leave everything whole on
    every device."""
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
    """The mesh as operators see it: which axes split their batch and their heads."""
    return OperatorMesh(mesh, AXES["batch"], AXES["heads"])


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions carry these logical axes."""
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


def parameter_axes(name: str, rank: int) -> tuple[str | None, ...]:
    """Logical axes of a parameter by its dotted name."""
    for pattern, axes in PARAMETERS:
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
            return (None,) * (rank - len(axes)) + axes
    raise InfiniteVLError(
        f"no sharding rule for parameter {name!r}",
        "add its name to PARAMETERS in infinitevl_jax/sharding/rules.py",
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell the compiler how an activation is laid out on the ambient mesh (`jax.set_mesh`); without
    one, x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def kept_whole(shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh) -> list[str]:
    """A line for each matrix of which every device holds all, although the mesh has parts for it:
    no size divides by them."""
    lines = []
    for name, shape in shapes.items():
        axes = parameter_axes(name, len(shape.shape))
        parts = {n: mesh.shape[n] for axis in axes for n in AXES[axis] if mesh.shape.get(n, 1) > 1}
        if (
            len(parts)
            and sum(axis is not None for axis in axes) > 1
            and not any(spec(axes, shape.shape, mesh))
        ):
            lines.append(
                f"{name} {list(shape.shape)}: no side divides by"
                f" {' or '.join(f'{n} {size}' for n, size in parts.items())}"
            )
    return lines


def parameter_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh
) -> dict[str, NamedSharding]:
    """Where every parameter lives, by dotted name."""
    return {
        name: NamedSharding(mesh, spec(parameter_axes(name, len(s.shape)), s.shape, mesh))
        for name, s in shapes.items()
    }
