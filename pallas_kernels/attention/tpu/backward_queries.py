"""The kernel for the gradient of the queries, for TPUs, in Pallas.

Computes dq = scale (p * (d_out v^T - shift)) k. The weights p = exp(scale q k^T - lse) are
recomputed. shift is sum(out * d_out) - d_lse, one number a query.

Tiling: as in the forward kernel, (blocks of query heads) x (visits, ordered by query block), with
dq in VMEM over the visits of one query block, the same parts and the same three bodies. lse and
shift arrive as rows. They are turned into columns that fill the lanes once for each query block.

Traffic: q, d_out and dq once; k and v once per block of `rows` queries and of `heads` heads. Floor:
6 D operations for each (query, head, visible key). With 16 heads, D 128 and 8192 tokens in a window
as long: 2.1 ms on a v5e, 0.45 on a v6e, or 0.9 because heads 128 wide fill half of its units.
Static score: 2.02 and 1.08 ms. On a v5e it is below the floor: instruction bundles do not show how
long a product occupies its unit.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.tpu.forward import LANES, PART, VMEM, dot, in_turn, lanes, like, see
from pallas_kernels.attention.tpu.plan import (
    DIAGONAL,
    FIRST,
    FLAG_BITS,
    LAST,
    MASKED,
    WHOLE,
    Visits,
)


def backward_queries(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    shift: jax.Array,
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
) -> jax.Array:
    """dq [queries, Hq * 128] in the dtype of q. Arguments as of `forward`, and

    d_out: as q. lse, shift: [Hq, queries] float32, finite; lse in units of log2, so large that p =
    0 for queries that are pads. No array may hold a NaN, in pads either.
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
        do_ref,
        lse_ref,
        shift_ref,
        ranges_ref,
        numbers_ref,
        dq_ref,
        *scratch,
    ):
        acc_ref, lse_columns, shift_columns = scratch
        flags = outer_ref[pl.program_id(1)]

        @pl.when(flags & FIRST != 0)
        def _begin():
            acc_ref[...] = jnp.zeros_like(acc_ref)

            @pl.loop(0, q_heads)
            def _(h):
                lse_columns[h] = jnp.broadcast_to(lse_ref[0, pl.ds(h, 1)], (LANES, rows)).T
                shift_columns[h] = jnp.broadcast_to(shift_ref[0, pl.ds(h, 1)], (LANES, rows)).T

        def add(seen, reached=lambda part: slice(0, keys)):
            @pl.loop(0, q_heads)
            def _(h):
                mine, theirs = lanes(h), lanes(lax.div(h * k_heads, q_heads) if k_heads > 1 else 0)

                def weigh(part):
                    scores = (
                        dot(q_ref[part, mine], k_ref[reached(part), theirs], (1, 1)) * log2_scale
                    )
                    return scores, dot(do_ref[part, mine], v_ref[reached(part), theirs], (1, 1))

                def add_up(part, products):
                    scores, d_weights = products
                    if seen is not None:
                        scores = jnp.where(seen[part, reached(part)], scores, -jnp.inf)
                    wide = (1, scores.shape[1] // LANES)
                    weights = jnp.exp2(scores - jnp.tile(lse_columns[h, part], wide))
                    d_scores = weights * (d_weights - jnp.tile(shift_columns[h, part], wide))
                    acc_ref[h, part] += dot(
                        d_scores.astype(k_ref.dtype), k_ref[reached(part), theirs], (1, 0)
                    )

                in_turn(weigh, add_up, rows, PART)

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
            @pl.loop(0, q_heads)
            def _(h):
                dq_ref[:, lanes(h)] = (acc_ref[h] * scale).astype(dq_ref.dtype)

    steps = (query_heads // q_heads, visits.count)
    lse, shift = (x.reshape(steps[0], q_heads, -1) for x in (lse, shift))
    query = pl.BlockSpec(
        (rows, q_heads * LANES), lambda h, s, outer, inner: (outer[s] >> FLAG_BITS, h)
    )
    key = pl.BlockSpec(
        (keys, k_heads * LANES),
        lambda h, s, outer, inner: (inner[s], lax.div(h * q_heads, groups * k_heads)),
    )
    number = pl.BlockSpec(
        (1, q_heads, rows), lambda h, s, outer, inner: (h, 0, outer[s] >> FLAG_BITS)
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=steps,
            in_specs=[
                query,
                key,
                key,
                query,
                number,
                number,
                pl.BlockSpec((rows, 8), lambda h, s, outer, inner: (outer[s] >> FLAG_BITS, 0)),
                pl.BlockSpec((8, keys), lambda h, s, outer, inner: (0, inner[s])),
            ],
            out_specs=query,
            scratch_shapes=[pltpu.VMEM((q_heads, rows, LANES), jnp.float32)] * 3,
        ),
        out_shape=like(q.shape, q.dtype, q, k, v, d_out),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM,
            disable_bounds_checks=True,
        ),
        interpret=interpret if interpret is not None else False,
        name="attention_backward_queries",
    )(visits.outer, visits.inner, q, k, v, d_out, lse, shift, ranges, numbers)
