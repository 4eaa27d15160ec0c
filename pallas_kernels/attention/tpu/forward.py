"""The forward kernel of attention for TPUs, in Pallas.

Computes out = softmax(scale q k^T) v and the log-sum-exp of the scores. A query sees the keys whose
number is in its range (plan.py).

Tiling: the grid is (blocks of query heads) x (visits). A visit is one block of query rows and one
of key rows, from the plan's list, so no step is spent on blocks that do not meet. A step takes
`heads` query heads in sequence, with the key heads that they read: scores [rows, keys] in float32,
new maximum, weights, weights @ v. It takes the rows in parts. The product of the next part is
written before the softmax of this one, because the compiler overlaps only what is close in program
order.

Maximum, sum and weighted values stay in VMEM over the visits of one query block. All are as wide as
a vector register: the maximum is repeated and the sum is spread over the lanes, so that only the
maximum needs a reduction across lanes in each step. There are three bodies. Blocks that are seen
whole skip the mask. On the diagonal, each part of the rows stops at its own last key. All others
are masked in full, with one mask for all heads.

Traffic: q and out once; k and v once per block of `rows` queries and of `heads` heads. Floor: 4 D
operations for each (query, head, visible key). With 16 heads, D 128 and 8192 tokens in a window as
long: 1.40 ms on a v5e (197 Tflop/s), 0.60 on a v5p (459), 0.30 on a v6e (918), or 0.60 because
heads 128 wide fill half of its 256 x 256 units. Memory needs a tenth of that. Static score: 1.59 ms
on a v5e, 0.86 on a v6e.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu.plan import (
    BLIND,
    DIAGONAL,
    FIRST,
    FLAG_BITS,
    LAST,
    MASKED,
    WHOLE,
    Visits,
)
from pallas_kernels.attention.tuning import TPU as TPUAttention

LANES = 128
PART = TPUAttention.part
LOWEST = -1e30  # running maximum before the first key: finite, so that -inf - LOWEST is no NaN
VMEM = 48 << 20  # bytes a kernel may use


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ranges: jax.Array,
    numbers: jax.Array,
    visits: Visits,
    *,
    heads: tuple[int, int],
    blocks: tuple[int, int],
    groups: int,
    scale: float,
    sinks: int,
    segments: bool,
    diagonal: bool,
    interpret: pltpu.InterpretParams | None,
) -> tuple[jax.Array, jax.Array]:
    """out [queries, Hq * 128] in the dtype of q and lse [Hq, queries] float32; 0 and -inf for
    queries that see nothing.

    q: [queries, Hq * 128], k, v: [keys, Hkv * 128]: rows of all sequences one after the other,
    heads side by side. Rows of k and v that are pads hold no NaN.
    ranges: [queries, 8], numbers: [8, keys] int32: `side_by_side` of what the plan's reach says.
    heads: query heads and key heads of a step. blocks: rows and keys of a block. groups: query
        heads of a key head.
    sinks, segments: whether and how the mask uses them. diagonal: whether there are visits of that
        kind.
    """
    (q_heads, k_heads), (rows, keys) = heads, blocks
    query_heads = q.shape[1] // LANES
    log2_scale = scale * math.log2(math.e)

    def kernel(
        outer_ref,
        _,
        q_ref,
        k_ref,
        v_ref,
        ranges_ref,
        numbers_ref,
        out_ref,
        lse_ref,
        acc_ref,
        top_ref,
        sum_ref,
        ends_ref,
    ):
        flags = outer_ref[pl.program_id(1)]

        @pl.when(flags & FIRST != 0)
        def _begin():
            acc_ref[...] = jnp.zeros_like(acc_ref)
            top_ref[...] = jnp.full_like(top_ref, LOWEST)
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def add(seen, reached=lambda part: slice(0, keys)):
            @pl.loop(0, q_heads)
            def _(h):
                mine, theirs = lanes(h), lanes(lax.div(h * k_heads, q_heads) if k_heads > 1 else 0)

                def weigh(part):
                    return dot(q_ref[part, mine], k_ref[reached(part), theirs], (1, 1)) * log2_scale

                def soften(part, scores):
                    if seen is not None:
                        scores = jnp.where(seen[part, reached(part)], scores, -jnp.inf)
                    registers = scores.shape[1] // LANES
                    old = top_ref[h, part]
                    new = jnp.maximum(old, jnp.max(scores, axis=1, keepdims=True))
                    weights = jnp.exp2(scores - jnp.tile(new, (1, registers)))
                    factor = jnp.exp2(old - new)
                    top_ref[h, part] = new
                    total = sum(jnp.split(weights, registers, axis=1))
                    sum_ref[h, part] = sum_ref[h, part] * factor + total
                    more = dot(weights.astype(v_ref.dtype), v_ref[reached(part), theirs], (1, 0))
                    acc_ref[h, part] = acc_ref[h, part] * factor + more

                in_turn(weigh, soften, rows, PART)

        @pl.when(flags & WHOLE != 0)
        def _whole():
            add(None)

        @pl.when(flags & MASKED != 0)
        def _masked():
            add(see(ranges_ref, numbers_ref, sinks, segments))

        if diagonal:

            @pl.when(flags & DIAGONAL != 0)
            def _diagonal():
                add(see(ranges_ref, numbers_ref, sinks, segments), lambda part: slice(0, part.stop))

        @pl.when(flags & LAST != 0)
        def _end():
            live = jnp.broadcast_to(ranges_ref[:, 1:2], (rows, LANES)) != BLIND
            lane = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1)

            @pl.loop(0, q_heads)
            def _(h):
                total = jnp.broadcast_to(jnp.sum(sum_ref[h], axis=1, keepdims=True), (rows, LANES))
                total = jnp.where(live, total, 0)
                some = total > 0
                inverse = 1 / jnp.where(some, total, 1)
                out_ref[:, lanes(h)] = jnp.where(some, acc_ref[h] * inverse, 0).astype(
                    out_ref.dtype
                )
                # One lane for each head's sum and one for its maximum, so that all heads become
                # rows at once.
                ends_ref[...] = jnp.where(
                    lane == h, total, jnp.where(lane == LANES // 2 + h, top_ref[h], ends_ref[...])
                )

            ends = ends_ref[...].T
            total, top = ends[:q_heads], ends[LANES // 2 : LANES // 2 + q_heads]
            lse_ref[0] = jnp.where(total > 0, top * math.log(2) + jnp.log(total), -jnp.inf)

    steps = (query_heads // q_heads, visits.count)

    def key_head(h):
        return lax.div(h * q_heads, groups * k_heads)

    query = pl.BlockSpec(
        (rows, q_heads * LANES), lambda h, s, outer, inner: (outer[s] >> FLAG_BITS, h)
    )
    key = pl.BlockSpec((keys, k_heads * LANES), lambda h, s, outer, inner: (inner[s], key_head(h)))
    out, lse = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=steps,
            in_specs=[
                query,
                key,
                key,
                pl.BlockSpec((rows, 8), lambda h, s, outer, inner: (outer[s] >> FLAG_BITS, 0)),
                pl.BlockSpec((8, keys), lambda h, s, outer, inner: (0, inner[s])),
            ],
            out_specs=[
                query,
                pl.BlockSpec(
                    (1, q_heads, rows), lambda h, s, outer, inner: (h, 0, outer[s] >> FLAG_BITS)
                ),
            ],
            scratch_shapes=[pltpu.VMEM((q_heads, rows, LANES), jnp.float32)] * 3
            + [pltpu.VMEM((rows, LANES), jnp.float32)],
        ),
        out_shape=[
            like(q.shape, q.dtype, q, k, v),
            like((steps[0], q_heads, q.shape[0]), jnp.float32, q, k, v),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
            disable_bounds_checks=True,
        ),
        interpret=interpret if interpret is not None else False,
        name="attention_forward",
    )(visits.outer, visits.inner, q, k, v, ranges, numbers)
    return out, lse.reshape(query_heads, -1)


def in_turn(before: Callable, after: Callable, rows: int, part_rows: int) -> None:
    """after(part, before(part)) for each part of the rows. `before` of a part is written next to
    `after` of the part before it. `before` is a product and most of `after` is not, and the
    compiler, which keeps close to program order, then overlaps them."""
    parts = [slice(i, min(i + part_rows, rows)) for i in range(0, rows, part_rows)]
    ready = before(parts[0])
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        coming = before(following) if following else None
        after(part, ready)
        ready = coming


def see(ranges_ref, numbers_ref, sinks: int, segments: bool, by_key: bool = False) -> jax.Array:
    """The mask: [rows, keys] booleans, or by_key [keys, rows]. The argument of the leading axis is
    a reference [n, 8] with a column for each item, the other one is [8, n]."""

    def items(ref, count, leads):
        return [ref[:, i : i + 1] if leads else ref[i : i + 1, :] for i in range(count)]

    low, high, q_segment_ids = items(ranges_ref, 3, not by_key)
    number, k_segment_ids = items(numbers_ref, 2, by_key)
    near = number >= low
    if sinks:
        near |= number < sinks
    seen = near & (number <= high)
    if segments:
        seen &= q_segment_ids == k_segment_ids
    return seen


def lanes(head: jax.Array | int) -> pl.Slice:
    """The columns of a head."""
    return pl.ds(pl.multiple_of(head * LANES, LANES), LANES)


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product over those axes in float32. Products of float32 are in full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    contract = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, contract, precision=precision, preferred_element_type=jnp.float32)


def like(shape, dtype, *arrays) -> jax.ShapeDtypeStruct:
    """A result that varies over a mesh as any of these arrays does (inside shard_map)."""

    def mix(*arrays):
        return lax.full_like(
            sum(x.reshape(-1)[0].astype(jnp.float32) for x in arrays), 0, dtype, shape
        )

    return jax.eval_shape(mix, *arrays)
