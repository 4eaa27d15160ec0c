"""Parameters of a checkpoint, laid out for a model that serves."""

from functools import partial

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.nn.fused import Layout
from infinitevl_jax.nn.fused_params import FusedParams, Group, Groups
from infinitevl_jax.nn.params import Parameter, Params, joint_layers, parameters
from infinitevl_jax.sharding import check_mesh, spec


def fuse(config: ModelConfig, params: Params, mesh: Mesh | None = None) -> FusedParams:
    """Fuse the layers that read the same input, as their modules declare it.

    Layers stay separate where their dtypes differ, some have biases and others none, or the mesh
    splits some and not others. On a mesh, each device keeps of every layer the columns that it had,
    and the decoder's matrices that had been split by rows are split by columns, as the operator
    `projection` works on them.

    Removes entries from `params` as it goes, so only one group at a time is in memory twice.

    Args:
      params: layer by layer.

    Raises:
      InfiniteVLError: the mesh has unknown or explicit axes.
    """
    if mesh is not None:
        check_mesh(mesh)
    known, arrays = parameters(config, scanned=False), {}
    groups = _groups(config, params, mesh)
    for group in groups:
        for leaf in group.leaves:
            names = [f"{member}.{leaf}" for member in group.members]
            split = None if mesh is None else _spec(known[names[0]], mesh)
            parts = [params.pop(name) for name in names]
            joined = _join(parts, group.layout, mesh, split)
            arrays[f"{group.name}.{leaf}"] = jax.block_until_ready(joined)
    for name in list(params):
        value, parameter = params.pop(name), known[name]
        if mesh is not None and _by_rows(name, parameter):
            by_columns = spec(parameter.axes[::-1], parameter.shape, mesh)
            value = jax.block_until_ready(jax.device_put(value, NamedSharding(mesh, by_columns)))
        arrays[name] = value
    return FusedParams(arrays, groups)


def _groups(config: ModelConfig, params: Params, mesh: Mesh | None) -> Groups:
    known, groups = parameters(config, scanned=False), []

    def kind(member: str) -> tuple:
        """What the members of a group have in common."""
        kernel, bias = params[f"{member}.kernel"], params.get(f"{member}.bias")
        split = None if mesh is None else _spec(known[f"{member}.kernel"], mesh)
        return split, kernel.dtype, None if bias is None else bias.dtype

    for name, (joint, members) in joint_layers(config).items():
        kinds = {kind(member) for member in members}
        if len(kinds) == 1:
            ((split, _, bias),) = kinds
            shapes = [known[f"{member}.kernel"].shape for member in members]
            shards = 1
            if mesh is not None:
                shards = shapes[0][1] // NamedSharding(mesh, split).shard_shape(shapes[0])[1]
            layout = joint.layout(tuple(width for _, width in shapes), shards)
            groups.append(Group(name, members, layout, bias is not None))
    return tuple(groups)


def _spec(parameter: Parameter, mesh: Mesh) -> PartitionSpec:
    return spec(parameter.axes, parameter.shape, mesh)


def _by_rows(name: str, parameter: Parameter) -> bool:
    """Matrices of the decoder's layers whose rows are heads or hidden units."""
    return (
        name.startswith("layers.") and parameter.facts.matmul and parameter.axes[1:] == ("width",)
    )


@partial(jax.jit, static_argnames=("layout", "mesh", "split"))
def _join(
    parts: list[Array], layout: Layout, mesh: Mesh | None, split: PartitionSpec | None
) -> Array:
    joined = layout.join(parts)
    if mesh is None or split is None:
        return joined
    between = [None] * (joined.ndim - len(split))
    place = NamedSharding(mesh, PartitionSpec(*split[:-1], *between, split[-1]))
    return jax.lax.with_sharding_constraint(joined, place)
