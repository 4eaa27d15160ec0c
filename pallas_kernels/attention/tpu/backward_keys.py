"""The kernel for the gradients of keys and values, for TPUs, in Pallas.

Computes dv = p^T d_out and dk = scale (p * (d_out v^T - shift))^T q. The weights p = exp(scale q
k^T - lse) are recomputed. shift is sum(out * d_out) - d_lse, one number a query.

Tiling: the grid is (blocks of key heads) x (visits, ordered by key block) x (parts of the query
heads that read them). Scores are [keys, rows]. lse and shift are then rows, and weights and their
gradients go into the sums without a transpose. dk and dv stay in VMEM over the visits of one key
block and sum over all query heads of a key head. On the diagonal, each part of the keys starts at
its own first query; elsewhere parts gain nothing here.

Traffic: k, v, dk and dv once; q and d_out once per block of `keys` keys. Floor: 8 D operations for
each (query, head, visible key). With 16 heads, D 128 and 8192 tokens in a window as long: 2.8 ms on
a v5e, 0.60 on a v6e, or 1.2 because heads 128 wide fill half of its units. Static score: 2.53 and
1.37 ms. On a v5e it is below the floor: instruction bundles do not show how long a product occupies
its unit.
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


def backward_keys(
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
) -> tuple[jax.Array, jax.Array]:
    """dk and dv [keys, Hkv * 128] in the dtypes of k and v. Arguments as of `backward_queries`, but

    ranges: [8, queries], numbers: [keys, 8]. visits: by key.
    """
    (q_heads, k_heads), (rows, keys) = heads, blocks
    parts = max(1, groups // q_heads)
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
        *results,
    ):
        dk_ref, dv_ref, dk_acc, dv_acc = results
        flags = outer_ref[pl.program_id(1)]
        part = pl.program_id(2)

        @pl.when((flags & FIRST != 0) & (part == 0))
        def _begin():
            dk_acc[...] = jnp.zeros_like(dk_acc)
            dv_acc[...] = jnp.zeros_like(dv_acc)

        def add(seen, part_rows=keys, reached=lambda part: slice(0, rows)):
            @pl.loop(0, q_heads)
            def _(h):
                at = lax.div(h * k_heads, q_heads) if k_heads > 1 else 0
                mine, theirs = lanes(h), lanes(at)

                def weigh(part):
                    scores = (
                        dot(k_ref[part, theirs], q_ref[reached(part), mine], (1, 1)) * log2_scale
                    )
                    return scores, dot(v_ref[part, theirs], do_ref[reached(part), mine], (1, 1))

                def add_up(part, products):
                    scores, d_weights = products
                    if seen is not None:
                        scores = jnp.where(seen[part, reached(part)], scores, -jnp.inf)
                    weights = jnp.exp2(scores - lse_ref[0, pl.ds(h, 1), reached(part)])
                    dv_acc[at, part] += dot(
                        weights.astype(do_ref.dtype), do_ref[reached(part), mine], (1, 0)
                    )
                    d_scores = weights * (d_weights - shift_ref[0, pl.ds(h, 1), reached(part)])
                    dk_acc[at, part] += dot(
                        d_scores.astype(q_ref.dtype), q_ref[reached(part), mine], (1, 0)
                    )

                in_turn(weigh, add_up, keys, part_rows)

        @pl.when(flags & WHOLE != 0)
        def _whole():
            add(None)

        @pl.when(flags & MASKED != 0)
        def _masked():
            add(see(ranges_ref, numbers_ref, sinks, segments, by_key=True))

        if diagonal:

            @pl.when(flags & DIAGONAL != 0)
            def _diagonal():
                add(
                    see(ranges_ref, numbers_ref, sinks, segments, by_key=True),
                    PART,
                    lambda part: slice(part.start, rows),
                )

        @pl.when((flags & LAST != 0) & (part == parts - 1))
        def _end():
            @pl.loop(0, k_heads)
            def _(h):
                dk_ref[:, lanes(h)] = (dk_acc[h] * scale).astype(dk_ref.dtype)
                dv_ref[:, lanes(h)] = dv_acc[h].astype(dv_ref.dtype)

    key_blocks = k.shape[1] // LANES // k_heads
    lse, shift = (x.reshape(key_blocks * parts, q_heads, -1) for x in (lse, shift))
    query = pl.BlockSpec(
        (rows, q_heads * LANES), lambda h, s, p, outer, inner: (inner[s], h * parts + p)
    )
    key = pl.BlockSpec(
        (keys, k_heads * LANES), lambda h, s, p, outer, inner: (outer[s] >> FLAG_BITS, h)
    )
    number = pl.BlockSpec(
        (1, q_heads, rows), lambda h, s, p, outer, inner: (h * parts + p, 0, inner[s])
    )
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(key_blocks, visits.count, parts),
            in_specs=[
                query,
                key,
                key,
                query,
                number,
                number,
                pl.BlockSpec((8, rows), lambda h, s, p, outer, inner: (0, inner[s])),
                pl.BlockSpec((keys, 8), lambda h, s, p, outer, inner: (outer[s] >> FLAG_BITS, 0)),
            ],
            out_specs=[key, key],
            scratch_shapes=[pltpu.VMEM((k_heads, keys, LANES), jnp.float32)] * 2,
        ),
        out_shape=[like(k.shape, k.dtype, q, k, v, d_out), like(v.shape, v.dtype, q, k, v, d_out)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM,
            disable_bounds_checks=True,
        ),
        interpret=interpret if interpret is not None else False,
        name="attention_backward_keys",
    )(visits.outer, visits.inner, q, k, v, d_out, lse, shift, ranges, numbers)
