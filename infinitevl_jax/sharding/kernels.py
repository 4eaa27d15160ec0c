"""Operators on a mesh: each device runs them on its own batch rows and heads, for the compiler cannot split a kernel.

Batch goes over (data, fsdp) and heads over (tensor), as `rules` says, so that activations need not move. With fewer key heads than
tensor shards each shard takes the key head that its queries use.
"""

from collections.abc import Callable

import jax
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from infinitevl_jax.sharding.rules import spec
from pallas_kernels.attend import check


def shard_attend(attend: Callable, mesh: Mesh) -> Callable:
    """The contract of `pallas_kernels.attend.attend`, on a mesh."""
    if mesh.size == 1:
        return attend

    def run(q: Array, k: Array, v: Array, q_index, k_index, q_segment, k_segment, mask, scale):
        check(q, k, v, q_segment, k_segment, mask)
        queries = _heads(q, mesh)
        keys = _heads(k, mesh)
        split, key_heads = mesh.shape.get("tensor", 1), k.shape[2]
        group = q.shape[2] // key_heads
        own = q.shape[2] // split  # query heads of a shard
        shared = queries[2] is not None and keys[2] is None  # several shards use the same key head
        if shared and group % own:
            queries, shared = PartitionSpec(queries[0], None, None, None), False
        rows = PartitionSpec(queries[0], None)

        def local(q, k, v, q_index, k_index, *segments):
            if shared:
                mine = lax.axis_index("tensor") * own // group
                k, v = (lax.dynamic_slice_in_dim(x, mine, 1, axis=2) for x in (k, v))
            return attend(q, k, v, q_index, k_index, *(segments or (None, None)), mask=mask, scale=scale)

        arrays = [q, k, v, q_index, k_index] + ([] if q_segment is None else [q_segment, k_segment])
        specs = (queries, keys, keys) + (rows,) * (len(arrays) - 3)
        out = queries, PartitionSpec(*queries[:3])
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)(*arrays)

    return run


def shard_gated_delta_rule(gated_delta_rule: Callable, mesh: Mesh) -> Callable:
    """The contract of `pallas_kernels.gated_delta_rule.gated_delta_rule`, on a mesh."""
    if mesh.size == 1:
        return gated_delta_rule

    def run(q: Array, k: Array, v: Array, g, beta, initial_state=None, index=None, segment=None):
        heads = _heads(q, mesh)
        gates, rows = PartitionSpec(*heads[:3]), PartitionSpec(heads[0], None)
        state = PartitionSpec(heads[0], heads[2], None, None)
        optional = {"initial_state": (initial_state, state), "index": (index, rows), "segment": (segment, rows)}
        given = {name: pair for name, pair in optional.items() if pair[0] is not None}

        def local(q, k, v, g, beta, *others):
            return gated_delta_rule(q, k, v, g, beta, **dict(zip(given, others, strict=True)))

        specs = (heads, heads, heads, gates, gates, *(s for _, s in given.values()))
        spread = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(heads, state), check_vma=False)
        return spread(q, k, v, g, beta, *(x for x, _ in given.values()))

    return run


def shard_unit_heads(unit_heads: Callable, mesh: Mesh) -> Callable:
    """The contract of `pallas_kernels.unit_heads.unit_heads` for x [batch, length, heads * width], on a mesh."""
    if mesh.size == 1:
        return unit_heads

    def run(x: Array, heads: int, eps: float):
        place = _heads(x.reshape(*x.shape[:2], heads, -1), mesh)
        place = PartitionSpec(*place[:3])
        own = heads // (mesh.shape["tensor"] if place[2] else 1)
        return jax.shard_map(lambda x: unit_heads(x, own, eps), mesh=mesh, in_specs=place, out_specs=place, check_vma=False)(x)

    return run


def _heads(x: Array, mesh: Mesh) -> PartitionSpec:
    """[batch, length, heads, dim]: the length whole on every device."""
    batch, *others = spec(("batch", None, "heads", None), x.shape, mesh)
    # Mesh axes of one part are named too: over an axis that is not named gradients are summed, if only with themselves.
    alone = tuple(name for name, size in mesh.shape.items() if size == 1)
    split = (batch,) if isinstance(batch, str) else batch or ()
    return PartitionSpec((*split, *alone) or None, *others)
