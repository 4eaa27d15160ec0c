"""Forward kernel of attention for Hopper GPUs, in Pallas Mosaic GPU.

Computes out = softmax(scale q k^T) v and the log-sum-exp of the scores. Query row t sees the key
rows first[t] to last[t] and no other: one rule for causal order, windows, packed sequences and
pads.

Tiling: a thread block takes 64 query rows of two query heads that share a key head; with an odd
number of query heads a key head, 128 query rows of one head. Two warpgroups compute, one head or
half the rows each. A third only starts copies (TMA) of key and value blocks of `keys` rows,
`stages` deep, which both read. Key blocks that no row of the tile sees are not loaded. Only those
that some row sees in part are masked. A warpgroup issues the scores of key block j together with
(weights of block j - 1) @ v, and computes the softmax of block j while the tensor cores run. The
two take turns in issuing, so that one computes softmax while the other multiplies (the schedule of
FlashAttention-3, Shah et al., arXiv 2407.08608). Tiles start with the last rows, whose ranges are
longest.

Traffic: q and out once, k and v once per 128 rows of (query, head) from the L2 cache. Floor: 4 D
operations for each (query, head, visible key), at 989 Tflop/s. With 16 heads, D 128 and a window of
8192: 0.28 ms at 8K, 1.95 at 32K.
"""

import math
from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.tuning import HopperForward as Tuning
from pallas_kernels.mosaic_gpu import Products, full, load, multiply, spread, transposed

ROWS = 64  # query rows of a tile: what one wgmma multiplies
LOWEST = -1e30  # running maximum before the first key: finite, so that -inf - LOWEST is no NaN


@partial(jax.jit, static_argnames="scale")  # a model's layers share one compiled kernel
def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array, last: jax.Array, scale: float
) -> tuple[jax.Array, jax.Array]:
    """out [B, T, Hq, D] in the dtype of q and lse [B, Hq, T] float32.

    q: [B, T, Hq, D]; k, v: [B, Tk, Hkv, D], D 64 or 128, T a multiple of 128, Tk of Tuning.keys.
    first, last: [B, T] int32, the key rows that each query row sees; first > last for none (out 0,
        lse -inf).
    """
    batch, length, q_heads, width = q.shape
    alone = q_heads // k.shape[2] % 2  # query heads without a partner on their key head
    heads, rows_of_tile = (1, 2 * ROWS) if alone else (2, ROWS)
    units, tiles = q_heads // heads, length // rows_of_tile
    keys, stages = Tuning.keys, min(Tuning.stages, k.shape[1] // Tuning.keys)
    units_per_key_head = units // k.shape[2]
    blocks = tile_blocks(first, last, rows_of_tile, keys)
    log2_scale = scale * math.log2(math.e)

    def kernel(q_ref, k_ref, v_ref, first_ref, last_ref, blocks_ref, out_ref, lse_ref, scratch):
        q_smem, k_smem, v_smem, lse_smem, q_ready, k_ready, v_ready, k_free, v_free, turn = scratch
        group = lax.axis_index("group")
        work = lax.axis_index("work")
        unit = lax.rem(work, units)
        b = lax.rem(lax.div(work, units), batch)
        tile = tiles - 1 - lax.div(work, units * batch)
        row = tile * rows_of_tile
        begin, whole, broken, end = (blocks_ref[b, tile, i] for i in range(4))

        def slot(j):
            return lax.rem(j - begin, stages)

        @pl.when(group < 2)
        def _compute():
            plgpu.set_max_registers(Tuning.registers[0], action="increase")
            head = unit if alone else unit * 2 + group
            mine = q_smem.at[group]
            rows = pl.ds(row + group * ROWS if alone else row, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], mine, q_ready.at[group])
            by_row = plgpu.Layout.WGMMA.reduce(1)
            low = load(first_ref.at[b, rows], by_row)
            high = load(last_ref.at[b, rows], by_row)
            plgpu.barrier_wait(q_ready.at[group])

            def hide(scores, j):
                key = (
                    plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), 1, layout=plgpu.Layout.WGMMA)
                    + j * keys
                )
                seen = (key >= spread(low, keys)) & (key <= spread(high, keys))
                return jnp.where(seen, scores, -jnp.inf)

            def soften(scores, top):
                """The weights, their sum, the new maximum, and the factor for what was weighted
                with the old maximum."""
                new = jnp.maximum(top, scores.max(axis=1) * log2_scale)
                weights = jnp.exp2(scores * log2_scale - spread(new, keys))
                return weights, weights.sum(axis=1), new, jnp.exp2(top - new)

            def start(j):
                def run(scores_ref):
                    products = Products()
                    plgpu.barrier_wait(k_ready.at[slot(j)])
                    plgpu.barrier_wait(turn.at[group])
                    products.add(scores_ref, mine, transposed(k_smem.at[slot(j)]))
                    plgpu.barrier_arrive(turn.at[1 - group])
                    return products.wait(scores_ref)

                scores = lax.optimization_barrier(
                    pl.run_scoped(run, plgpu.ACC((ROWS, keys), jnp.float32))
                )
                plgpu.barrier_arrive(k_free.at[slot(j)])
                plgpu.barrier_wait(v_ready.at[slot(j)])
                weights, total, top, _ = soften(hide(scores, j), full((ROWS,), LOWEST, by_row))
                return (
                    full((ROWS, width), 0, plgpu.Layout.WGMMA),
                    top,
                    total,
                    weights.astype(q.dtype),
                )

            def step(j, carry, masked):
                acc, top, total, weights = carry

                def run(scores_ref, acc_ref):
                    acc_ref[...] = acc
                    products = Products()
                    plgpu.barrier_wait(k_ready.at[slot(j)])
                    plgpu.barrier_wait(turn.at[group])
                    products.add(scores_ref, mine, transposed(k_smem.at[slot(j)]))
                    products.add(acc_ref, weights, v_smem.at[slot(j - 1)])
                    plgpu.barrier_arrive(turn.at[1 - group])
                    scores = products.wait(scores_ref, running=1)
                    plgpu.barrier_arrive(k_free.at[slot(j)])
                    softened = soften(hide(scores, j) if masked else scores, top)
                    softened = lax.optimization_barrier(softened)
                    # Wait here for the next step's input. The compiler moves no work past the loop
                    # of this wait. It would move the softmax past the wait for the product that it
                    # should run beside.
                    plgpu.barrier_wait(v_ready.at[slot(j)])
                    done = lax.optimization_barrier((products.wait(acc_ref), *softened))
                    plgpu.barrier_arrive(v_free.at[slot(j - 1)])
                    return done

                refs = plgpu.ACC((ROWS, keys), jnp.float32), plgpu.ACC((ROWS, width), jnp.float32)
                acc, weights, more, top, factor = pl.run_scoped(run, *refs)
                # Narrow the weights only now: ptxas makes every wgmma wait for the last if the
                # operand registers of one are written while another is in flight (its message
                # C7513).
                return (
                    acc * spread(factor, width),
                    top,
                    total * factor + more,
                    weights.astype(q.dtype),
                )

            def finish(carry):
                acc, top, total, weights = carry
                acc = multiply(acc, (weights, v_smem.at[slot(end - 1)]))
                plgpu.barrier_arrive(v_free.at[slot(end - 1)])
                real = low <= high
                inverse = jnp.where(real, 1 / total, 0.0)
                lse = top * math.log(2) + jnp.log(total)
                lse_smem[group] = jnp.where(real, lse, -jnp.inf)
                mine[...] = jnp.where(
                    spread(real, width), acc * spread(inverse, width), 0.0
                ).astype(q.dtype)

            pl.when((group == 1) & (begin < end))(lambda: plgpu.barrier_arrive(turn.at[0]))

            @pl.when(begin < end)
            def _():
                carry = start(begin)
                carry = lax.fori_loop(begin + 1, whole, lambda j, c: step(j, c, True), carry)
                carry = lax.fori_loop(
                    jnp.maximum(begin + 1, whole), broken, lambda j, c: step(j, c, False), carry
                )
                carry = lax.fori_loop(
                    jnp.maximum(begin + 1, broken), end, lambda j, c: step(j, c, True), carry
                )
                finish(carry)

            @pl.when(begin >= end)
            def _():
                lse_smem[group] = full((ROWS,), -jnp.inf, by_row)
                mine[...] = full((ROWS, width), 0, plgpu.Layout.WGMMA).astype(q.dtype)

            pl.when((group == 0) & (begin < end))(lambda: plgpu.barrier_wait(turn.at[0]))
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_ref.at[b, rows, head])
            plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_ref.at[b, head, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == 2)
        def _copy():
            plgpu.set_max_registers(Tuning.registers[1], action="decrease")
            head = lax.div(unit, units_per_key_head)

            @pl.loop(begin, end)
            def _(j):
                block = b, pl.ds(j * keys, keys), head
                reused = j >= begin + stages
                for source, target, ready, free in (
                    (k_ref, k_smem, k_ready, k_free),
                    (v_ref, v_smem, v_ready, v_free),
                ):
                    pl.when(reused)(lambda free=free: plgpu.barrier_wait(free.at[slot(j)]))
                    plgpu.copy_gmem_to_smem(source.at[block], target.at[slot(j)], ready.at[slot(j)])

    def entry(*refs):
        tiled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

        def shared(*shape):
            return plgpu.SMEM(shape, q.dtype, transforms=tiled)

        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            shared(2, ROWS, width),
            shared(stages, keys, width),
            shared(stages, keys, width),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=2),
            collective_axes="group",
        )

    return plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, q_heads, length), jnp.float32),
        ],
        grid=(tiles * batch * units,),
        grid_names=("work",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        kernel_name="attention_forward",
    )(q, k, v, first, last, blocks)


def tile_blocks(
    first: jax.Array, last: jax.Array, rows: int, keys: int, strict: bool = False
) -> jax.Array:
    """[B, tiles, 4] int32: begin, whole, broken, end. A tile of `rows` rows meets the blocks begin
    <= j < end of `keys` columns. All its rows see all of the blocks whole <= j < broken.

    Rows that see nothing do not count. strict: a tile that has such a row has no whole blocks.
    """
    first, last = (x.reshape(x.shape[0], -1, rows) for x in (first, last))
    real = first <= last
    many = jnp.iinfo(jnp.int32).max // 2
    begin = jnp.where(real, first, many).min(axis=2) // keys
    whole = (jnp.where(real, first, -1).max(axis=2) + keys - 1) // keys
    broken = (jnp.where(real, last, many).min(axis=2) + 1) // keys
    end = jnp.where(real, last, -1).max(axis=2) // keys + 1
    if strict:
        whole = jnp.where(real.all(axis=2), whole, many)
    begin = jnp.minimum(begin, end)
    whole = jnp.clip(whole, begin, end)
    broken = jnp.clip(broken, whole, end)
    return jnp.stack([begin, whole, broken, end], axis=2)
