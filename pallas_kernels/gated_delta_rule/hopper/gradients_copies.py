"""The third warpgroup of the gradients kernel: copies from global to shared memory, the next
chunk's included."""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.chunk_scan_backward import CHUNK
from pallas_kernels.gated_delta_rule.hopper.gradients_memory import (
    STAGES,
    Barriers,
    Memory,
    Refs,
    Work,
    columns,
)


def copies(work: Work, refs: Refs, smem: Memory, barriers: Barriers) -> None:
    """Runs through the thread block's chunks."""

    @pl.loop(0, work.chunks)
    def _(j):
        b, head, n = work.place(j)
        tokens = pl.ds(n * CHUNK, CHUNK)
        at = lax.rem(j, STAGES)
        pl.when(j >= STAGES)(lambda: plgpu.barrier_wait(barriers.chunk_free.at[at]))
        whole = (
            (refs.k.at[b, tokens, head], smem.k),
            (refs.inverse.at[b, head, n, 0], smem.inverse),
            (refs.vectors.at[b, head, n], smem.vectors),
        )
        for source, target in whole:
            plgpu.copy_gmem_to_smem(source, target.at[at], barriers.chunk_ready.at[at])

        @pl.loop(0, work.slices)
        def _(s):
            c = j * work.slices + s
            here = lax.rem(c, STAGES)
            pl.when(c >= STAGES)(lambda: plgpu.barrier_wait(barriers.slice_free.at[here]))
            parts = [
                (ref.at[b, tokens, head, columns(s)], x)
                for ref, x in ((refs.v, smem.v), (refs.d_out, smem.d_out))
            ]
            parts += [
                (ref.at[b, head, n, :, columns(s)], x)
                for ref, x in ((refs.x, smem.x), (refs.states, smem.states))
            ]
            parts += [(refs.d_states.at[b, head, n, columns(s)], smem.d_states)]
            for source, target in parts:
                plgpu.copy_gmem_to_smem(source, target.at[here], barriers.slice_ready.at[here])

        # Needed after all slices. It has one place, which the last chunk's dq leaves during the
        # first slice.
        pl.when(j > 0)(lambda: plgpu.barrier_wait(barriers.q_free))
        plgpu.copy_gmem_to_smem(refs.q.at[b, tokens, head], smem.q, barriers.q_ready)
