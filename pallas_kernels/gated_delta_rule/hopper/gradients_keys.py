"""The second warpgroup of the gradients kernel: what belongs to keys (dA, x S^T, new dS'^T, dk) and
the sums of the gates. gradients.py gives the formulas."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.chunk_scan_backward import (
    BETA,
    CHUNK,
    SINCE,
    UNTIL,
    decays,
)
from pallas_kernels.gated_delta_rule.hopper.gradients_memory import (
    D_BETA_TOO,
    D_GATE,
    LAST,
    SQUARE,
    STAGES,
    WIDE,
    Barriers,
    Memory,
    Refs,
    Work,
)
from pallas_kernels.gated_delta_rule.hopper.spans import KEY
from pallas_kernels.mosaic_gpu import (
    Products,
    across,
    full,
    load,
    multiply,
    rounded_halves,
    spread,
    transposed,
)

f32, bf16 = jnp.float32, jnp.bfloat16
WGMMA = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = WGMMA.reduce(1), WGMMA.reduce(0)


def keys(work: Work, refs: Refs, smem: Memory, barriers: Barriers) -> None:
    """Runs through the thread block's chunks."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, SQUARE, i, layout=WGMMA) for i in (0, 1))
    # Not a constant: the compiler would know some elements of `later`, which is a left factor in
    # registers below (see `Products`).
    later = jnp.where(column >= row + refs.zero[0], 1.0, 0.0).astype(bf16)
    slices = work.slices

    @pl.loop(0, work.chunks)
    def _(j):
        b, head, n = work.place(j)
        at = lax.rem(j, STAGES)
        k_, vector = smem.k.at[at], smem.vectors.at[at]
        plgpu.barrier_wait(barriers.chunk_ready.at[at])

        def of_row(which):
            return load(vector.at[which], BY_ROW)

        def step(s, carry):
            c, p = j * slices + s, j * (slices + 1) + s
            here, there = lax.rem(c, STAGES), lax.rem(p, STAGES)
            x_, s_, ds_ = smem.x.at[here], smem.states.at[here], smem.d_states.at[here]
            new_ = smem.new.at[there]

            def run(*sums):
                for acc, start in zip(sums, carry, strict=True):
                    acc[...] = start
                writes, keeps, d_a = sums
                products = Products()
                plgpu.barrier_wait(barriers.slice_ready.at[here])
                products.add(writes, x_, transposed(s_))
                plgpu.barrier_wait(barriers.new_ready.at[there])
                products.add(keeps, new_.at[0], ds_)
                for i in range(2):
                    products.add(d_a, x_, transposed(new_.at[i]))
                return lax.optimization_barrier(
                    (products.wait(writes), products.take(keeps), products.take(d_a))
                )

            carry = pl.run_scoped(run, *(plgpu.ACC(shape, f32) for shape in (WIDE, WIDE, SQUARE)))
            plgpu.barrier_arrive(barriers.slice_free.at[here])
            plgpu.barrier_arrive(barriers.new_free.at[there])

            @pl.when((s == 0) & (j > 0))
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(barriers.chunk_free.at[1 - at])

            return carry

        start = tuple(full(shape, 0, WGMMA) for shape in (WIDE, WIDE, SQUARE))
        writes, keeps, d_a = lax.fori_loop(0, slices, step, start)

        beta, until = of_row(BETA), of_row(UNTIL)
        back = -beta * of_row(SINCE)
        keys = k_[...].astype(f32)
        from_state = back * jnp.sum(keys * writes, axis=1)
        smem.row[...] = until * jnp.sum(keys * keeps, axis=1)
        dk = spread(back, KEY) * writes + spread(until, KEY) * keeps

        def early(dk_acc, gram_acc):
            dk_acc[...] = dk
            products = Products()
            products.add(gram_acc, k_, transposed(k_))
            plgpu.barrier_wait(barriers.q_ready)
            plgpu.barrier_wait(barriers.scores_ready)
            products.add(dk_acc, transposed(smem.inverse.at[at]), smem.q)
            return lax.optimization_barrier((products.wait(dk_acc), products.take(gram_acc)))

        dk, gram = pl.run_scoped(early, plgpu.ACC(WIDE, f32), plgpu.ACC(SQUARE, f32))
        plgpu.barrier_arrive(barriers.scores_read)
        d_a = jnp.where(column < row, -d_a * decays(vector, row, column), 0.0)
        smem.sums[D_BETA_TOO] = jnp.sum(d_a * gram, axis=1)
        d_gram = spread(beta, CHUNK) * d_a
        gates = d_gram * gram
        gates += jnp.where(
            (row == LAST) & (column < LAST), across(load(smem.row, BY_COLUMN), CHUNK), 0.0
        )
        gates = jnp.where(column == LAST, spread(from_state, CHUNK), gates)
        there = lax.rem(j * (slices + 1) + slices, STAGES)
        tiles = [smem.new.at[there, i] for i in range(2)]
        plgpu.barrier_wait(barriers.new_ready.at[there])
        for tile in tiles:
            gates += tile[...].astype(f32)
        for tile, half in zip(tiles, rounded_halves(gates), strict=True):
            tile[...] = half
        plgpu.commit_smem()
        spans = multiply(SQUARE, *((later, tile) for tile in tiles))
        spans = jnp.where((column < row) | (column == LAST), spans, 0.0)
        smem.sums[D_GATE] = jnp.sum(spans, axis=1)
        tile = tiles[0]
        tile[...] = d_gram.astype(bf16)
        plgpu.commit_smem()
        dk = multiply(dk, (tile, k_), (transposed(tile), k_))
        plgpu.barrier_arrive(barriers.new_free.at[there])
        plgpu.barrier_wait(barriers.k_read)
        k_[...] = dk.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_, refs.dk.at[b, pl.ds(n * CHUNK, CHUNK), head])
        sums = pl.ds(D_GATE, 2)
        plgpu.copy_smem_to_gmem(smem.sums.at[sums], refs.sums.at[b, head, n, sums])

    plgpu.wait_smem_to_gmem(0)
