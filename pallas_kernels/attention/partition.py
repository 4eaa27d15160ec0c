"""Attention and its one-token step on a mesh.

Rows go over the batch axes and heads over the head axes. With fewer key/value heads than head
shards, each shard takes the key head of its queries. The cache is then replicated, and each shard
writes the same keys.
"""

from collections.abc import Callable

from jax import Array, lax
from jax.sharding import PartitionSpec

from pallas_kernels.attention.api import complete, step_arguments
from pallas_kernels.attention.state import KVCache
from pallas_kernels.attention.step import append
from pallas_kernels.partition import Axes, OperatorMesh


def partition_attention(attention: Callable, mesh: OperatorMesh) -> Callable:
    """The contract of `attention` over the arrays of a mesh."""

    def run(*args, **kwargs):
        call = complete(*args, **kwargs)
        batch = mesh.rows(call.q.shape[0])
        query_heads, key_heads, own = _grouped(call.q.shape[2], call.k.shape[2], mesh)
        queries, keys = (
            PartitionSpec(batch, None, heads, None) for heads in (query_heads, key_heads)
        )
        rows = PartitionSpec(batch, None)

        def local(k, v, **others):
            return attention(k=own(k, 2), v=own(v, 2), **others, mask=call.mask, scale=call.scale)

        specs = dict(zip(call._fields, (queries, keys, keys, rows, rows, rows, rows), strict=False))
        arrays = {name: (getattr(call, name), spec) for name, spec in specs.items()}
        return mesh.run(local, arrays, (queries, PartitionSpec(*queries[:3])))

    return run


def partition_attention_step(step: Callable, mesh: OperatorMesh) -> Callable:
    """The contract of `attention_step` over the arrays of a mesh."""

    def run(*args, **kwargs):
        call = step_arguments(*args, **kwargs)
        q, k, kv_cache = call["q"], call["k"], call["kv_cache"]
        batch = mesh.rows(q.shape[0])
        query_heads, key_heads, own = _grouped(q.shape[1], k.shape[1], mesh)
        replicated = query_heads != key_heads
        rule = {name: call[name] for name in ("window", "scale", "sinks")}

        def local(q, k, v, kv_cache, token_index):
            mine = KVCache(*(own(x, 2) for x in kv_cache))
            out, new = step(q, own(k, 1), own(v, 1), mine, token_index, **rule)
            return out, append(kv_cache, k, v, token_index, call["sinks"]) if replicated else new

        queries, keys = (PartitionSpec(batch, heads, None) for heads in (query_heads, key_heads))
        slots = KVCache(*[PartitionSpec(batch, None, key_heads, None)] * 2)
        run_local = mesh.shard_map(
            local, (queries, keys, keys, slots, PartitionSpec(batch)), (queries, slots)
        )
        return run_local(q, k, call["v"], kv_cache, call["token_index"])

    return run


def _grouped(
    query_heads: int, key_heads: int, mesh: OperatorMesh
) -> tuple[Axes, Axes, Callable[[Array, int], Array]]:
    """Axes of query heads, axes of key heads, and the function that takes a shard's key heads on
    an axis."""
    queries, keys = mesh.heads(query_heads), mesh.heads(key_heads)
    if queries == keys:
        return queries, keys, lambda x, axis: x
    group, each = query_heads // key_heads, query_heads // mesh.head_shards
    if group % each:  # a shard would have queries of several key heads
        return None, None, lambda x, axis: x
    return (
        queries,
        None,
        lambda x, axis: lax.dynamic_slice_in_dim(
            x, mesh.head_shard() * each // group, 1, axis=axis
        ),
    )
