"""Operators and token steps on a mesh: each device runs them on its own batch rows and heads, for the compiler cannot split a kernel.

Batch goes over (data, fsdp) and heads over (tensor), as `rules` says, so that activations need not move. With fewer key heads than
tensor shards each shard takes the key head that its queries use. A ring of cached keys then lies whole on each of them, and each writes
the new token's key heads into it, all of them: so all hold the same ring, and nothing moves.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from infinitevl_jax.sharding.rules import spec
from pallas_kernels.attend import check
from pallas_kernels.attend.decode import Ring, join
from pallas_kernels.gated_delta_rule.decode import Inputs, State, Weights

Axes = tuple[str, ...] | str | None  # of a mesh, that split a dimension


def shard_attend(attend: Callable, mesh: Mesh) -> Callable:
    """The contract of `pallas_kernels.attend.attend`, on a mesh."""
    if mesh.size == 1:
        return attend

    def run(q: Array, k: Array, v: Array, q_index, k_index, q_segment, k_segment, mask, scale):
        check(q, k, v, q_segment, k_segment, mask)
        batch = _rows(q.shape[0], mesh)
        query_heads, key_heads, own = _grouped(q.shape[2], k.shape[2], mesh)
        queries, keys = (PartitionSpec(batch, None, heads, None) for heads in (query_heads, key_heads))
        rows = PartitionSpec(batch, None)

        def local(q, k, v, q_index, k_index, *segments):
            k, v = own(k, 2), own(v, 2)
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
        batch, split = _rows(q.shape[0], mesh), _split(q.shape[2], mesh)
        heads, gates, rows = PartitionSpec(batch, None, split, None), PartitionSpec(batch, None, split), PartitionSpec(batch, None)
        state = PartitionSpec(batch, split, None, None)
        optional = {"initial_state": (initial_state, state), "index": (index, rows), "segment": (segment, rows)}
        return _spread(gated_delta_rule, mesh, (q, k, v, g, beta), (heads, heads, heads, gates, gates), optional, (heads, state))

    return run


def shard_causal_conv(causal_conv: Callable, mesh: Mesh) -> Callable:
    """The contract of `pallas_kernels.causal_conv.causal_conv`, on a mesh: channels go with heads."""
    if mesh.size == 1:
        return causal_conv

    def run(x: Array, weight: Array, tail: Array | None = None, index: Array | None = None, segment: Array | None = None):
        batch, channels = _rows(x.shape[0], mesh), _split(x.shape[2], mesh)
        tokens, rows = PartitionSpec(batch, None, channels), PartitionSpec(batch, None)
        optional = {"tail": (tail, tokens), "index": (index, rows), "segment": (segment, rows)}
        arrays = x, weight.astype(jnp.float32)  # its gradient is summed over devices
        return _spread(causal_conv, mesh, arrays, (tokens, PartitionSpec(None, channels)), optional, (tokens, tokens))

    return run


def shard_unit_heads(unit_heads: Callable, mesh: Mesh) -> Callable:
    """The contract of `pallas_kernels.unit_heads.unit_heads` for x [batch, length, heads * width], on a mesh."""
    if mesh.size == 1:
        return unit_heads

    def run(x: Array, heads: int, eps: float):
        split = _split(heads, mesh)
        place = PartitionSpec(_rows(len(x), mesh), None, split)
        own = heads // (mesh.shape["tensor"] if split else 1)
        return jax.shard_map(lambda x: unit_heads(x, own, eps), mesh=mesh, in_specs=place, out_specs=place, check_vma=False)(x)

    return run


def shard_attend_step(step: Callable, mesh: Mesh) -> Callable:
    """The contract of `pallas_kernels.attend.decode.step`, on a mesh. Where shards share key heads, each gives `step` a
    copy of its own."""
    if mesh.size == 1:
        return step

    def run(q: Array, k: Array, v: Array, ring: Ring, index: Array, window: int | None, scale: float):
        batch = _rows(q.shape[0], mesh)
        query_heads, key_heads, own = _grouped(q.shape[1], k.shape[1], mesh)
        shared = query_heads != key_heads

        def local(q, k, v, ring, index):
            mine = Ring(*(own(x, 2) for x in ring))
            out, new = step(q, own(k, 1), own(v, 1), mine, index, window, scale)
            return out, join(ring, k, v, index) if shared else new

        queries, keys = (PartitionSpec(batch, heads, None) for heads in (query_heads, key_heads))
        slots = Ring(*[PartitionSpec(batch, None, key_heads, None)] * 2)
        specs = queries, keys, keys, slots, PartitionSpec(batch)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(queries, slots), check_vma=False)(q, k, v, ring, index)

    return run


def shard_gated_delta_step(step: Callable, mesh: Mesh) -> Callable:
    """The contract of `pallas_kernels.gated_delta_rule.decode.step`, on a mesh."""
    if mesh.size == 1:
        return step

    def run(inputs: Inputs, weights: Weights, state: State, index: Array, eps: float):
        batch, heads = _rows(len(index), mesh), _split(state.memory.shape[1], mesh)
        channels, tails = PartitionSpec(batch, heads), PartitionSpec(batch, None, heads)
        taps, numbers = PartitionSpec(None, heads), PartitionSpec(heads)
        states = State(PartitionSpec(batch, heads, None, None), tails, tails, tails)
        weights_specs = Weights(taps, taps, taps, A_log=numbers, dt_bias=numbers, norm=PartitionSpec(None))
        specs = Inputs(*[channels] * len(inputs)), weights_specs, states, PartitionSpec(batch)
        local = partial(step, eps=eps)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(channels, states), check_vma=False)(inputs, weights, state, index)

    return run


def _spread(operator: Callable, mesh: Mesh, arrays: tuple, specs: tuple, optional: dict[str, tuple], out: tuple):
    """Each device's share of `operator(*arrays, **optional)`; optional: name -> (array or None, its PartitionSpec)."""
    given = {name: pair for name, pair in optional.items() if pair[0] is not None}
    more, more_specs = zip(*given.values(), strict=True) if given else ((), ())

    def local(*shares):
        return operator(*shares[: len(arrays)], **dict(zip(given, shares[len(arrays) :], strict=True)))

    return jax.shard_map(local, mesh=mesh, in_specs=(*specs, *more_specs), out_specs=out, check_vma=False)(*arrays, *more)


def _grouped(query_heads: int, key_heads: int, mesh: Mesh) -> tuple[Axes, Axes, Callable[[Array, int], Array]]:
    """Mesh axes of query heads and of key heads, and what takes from a shard's key heads, on an axis of an array, those of its queries."""
    queries, keys = _split(query_heads, mesh), _split(key_heads, mesh)
    if queries == keys:
        return queries, keys, lambda x, axis: x
    group, each = query_heads // key_heads, query_heads // mesh.shape["tensor"]
    if group % each:  # a shard would have queries of several key heads
        return None, None, lambda x, axis: x
    return queries, None, lambda x, axis: lax.dynamic_slice_in_dim(x, lax.axis_index("tensor") * each // group, 1, axis=axis)


def _split(heads: int, mesh: Mesh) -> Axes:
    """The mesh axes that split this many heads."""
    return spec(("heads",), (heads,), mesh)[0]


def _rows(batch: int, mesh: Mesh) -> Axes:
    """The mesh axes that split this many sequences."""
    split = spec(("batch",), (batch,), mesh)[0]
    # Mesh axes of one part are named too: over an axis that is not named gradients are summed, if only with themselves.
    alone = tuple(name for name, size in mesh.shape.items() if size == 1)
    return (*((split,) if isinstance(split, str) else split or ()), *alone) or None
