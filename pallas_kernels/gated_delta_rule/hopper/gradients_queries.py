"""The first warpgroup of the gradients kernel: `new`, and what belongs to queries (dP, d_out S^T,
dq), with dv. gradients.py gives the formulas."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.chunk_scan_backward import BETA, CHUNK, SINCE, decays
from pallas_kernels.gated_delta_rule.hopper.gradients_memory import (
    D_BETA,
    LAST,
    PRODUCT,
    SQUARE,
    STAGES,
    WIDE,
    Barriers,
    Memory,
    Refs,
    Work,
    columns,
)
from pallas_kernels.gated_delta_rule.hopper.spans import KEY, WIDTH
from pallas_kernels.mosaic_gpu import (
    Products,
    full,
    load,
    multiply,
    rounded_halves,
    spread,
    transposed,
)

f32, bf16 = jnp.float32, jnp.bfloat16
WGMMA = plgpu.Layout.WGMMA
BY_ROW = WGMMA.reduce(1)


def queries(work: Work, refs: Refs, smem: Memory, barriers: Barriers) -> None:
    """Runs through the thread block's chunks."""
    row, column = (plgpu.broadcasted_iota(jnp.int32, SQUARE, i, layout=WGMMA) for i in (0, 1))
    slices = work.slices

    @pl.loop(0, work.chunks)
    def _(j):
        b, head, n = work.place(j)
        tokens = pl.ds(n * CHUNK, CHUNK)
        at = lax.rem(j, STAGES)
        k_, t_, vector = smem.k.at[at], smem.inverse.at[at], smem.vectors.at[at]
        plgpu.barrier_wait(barriers.chunk_ready.at[at])

        def of_row(which):
            return load(vector.at[which], BY_ROW)

        def share(p, tile):
            there = lax.rem(p, STAGES)
            pl.when(p >= STAGES)(lambda: plgpu.barrier_wait(barriers.new_free.at[there]))
            for i, half in enumerate(rounded_halves(tile)):
                smem.new.at[there, i][...] = half
            plgpu.commit_smem()
            plgpu.barrier_arrive(barriers.new_ready.at[there])

        def step(s, carry):
            reads, d_scores, product, d_beta = carry
            c, p = j * slices + s, j * (slices + 1) + s
            here, there = lax.rem(c, STAGES), lax.rem(p, STAGES)
            do_, x_, s_ = smem.d_out.at[here], smem.x.at[here], smem.states.at[here]
            plgpu.barrier_wait(barriers.slice_ready.at[here])

            def read(known_acc, reads_acc, product_acc):
                reads_acc[...], product_acc[...] = reads, product
                products = Products()
                products.add(known_acc, k_, s_)
                products.add(reads_acc, do_, transposed(s_))
                products.add(product_acc, smem.d_states.at[here], s_)
                known = products.wait(known_acc, running=2)
                rest = smem.v.at[here][...].astype(f32) - spread(of_row(SINCE), WIDTH) * known
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                @pl.when((s == 0) & (j > 0))
                def _():
                    plgpu.barrier_arrive(barriers.q_free)
                    plgpu.barrier_arrive(barriers.chunk_free.at[1 - at])

                smem.work[...] = (spread(of_row(BETA), WIDTH) * rest).astype(bf16)
                plgpu.commit_smem()
                more = jnp.sum(x_[...].astype(f32) * rest, axis=1)
                return lax.optimization_barrier(
                    (products.wait(reads_acc), products.take(product_acc), more)
                )

            accumulators = (plgpu.ACC(shape, f32) for shape in (SQUARE, WIDE, SQUARE))
            reads, product, more = pl.run_scoped(read, *accumulators)
            share(p, multiply(SQUARE, (t_, smem.work)))
            smem.work[...] = (spread(of_row(BETA), WIDTH) * x_[...].astype(f32)).astype(bf16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem.work, refs.dv.at[b, tokens, head, columns(s)])
            d_scores = multiply(
                d_scores, *((do_, transposed(smem.new.at[there, i])) for i in range(2))
            )
            plgpu.barrier_arrive(barriers.slice_free.at[here])
            return reads, d_scores, product, d_beta + more

        zeros = tuple(full(shape, 0, WGMMA) for shape in (WIDE, SQUARE, SQUARE))
        start = *zeros, full((CHUNK,), 0, BY_ROW)
        reads, d_scores, product, d_beta = lax.fori_loop(0, slices, step, start)

        d_gram = d_scores * decays(vector, row, column)
        high, low = rounded_halves(d_gram)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        t_[...], smem.work[...] = high, low  # T and dv are no longer needed
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.scores_ready)
        smem.sums[D_BETA] = d_beta
        smem.sums[PRODUCT] = jnp.sum(jnp.where(column == row, product, 0.0), axis=1)
        plgpu.barrier_wait(barriers.q_ready)
        gates = jnp.where(column < row, d_gram * multiply(SQUARE, (smem.q, transposed(k_))), 0.0)
        since = of_row(SINCE)
        from_state = since * jnp.sum(smem.q[...].astype(f32) * reads, axis=1)
        share(
            j * (slices + 1) + slices, jnp.where(column == LAST, spread(from_state, CHUNK), gates)
        )
        dq = multiply(spread(since, KEY) * reads, (t_, k_), (smem.work, k_))
        plgpu.barrier_arrive(barriers.k_read)
        plgpu.barrier_wait(barriers.scores_read)
        # In place of q, which is free once dq is copied. Nobody waits for that before the next
        # chunk.
        smem.q[...] = dq.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem.q, refs.dq.at[b, tokens, head])
        sums = pl.ds(D_BETA, 2)
        plgpu.copy_smem_to_gmem(smem.sums.at[sums], refs.sums.at[b, head, n, sums])

    plgpu.wait_smem_to_gmem(0)
