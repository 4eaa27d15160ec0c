"""The walk over the chunks, with their outputs: the second of two forward kernels for Hopper GPUs, in Pallas Mosaic GPU.

Computes, chunk after chunk and in the notation of xla.py, new = T beta (V - d K S), out = d Q S + (Q K^T * D) new and
S' = d_C S + (D_C K)^T new, from the inputs and what mosaic_gpu_chunks.py makes of them.

Tiling: a warpgroup carries 64 columns of one head's state through the whole sequence. Everything stands transposed, [V, tokens] and
[V, K]: so the state is an accumulator that never leaves the registers, and is, rounded, the register operand of its own products; likewise
`new`. What other warpgroups or chunks share (k, q, T, scores) comes from shared memory, to which one more warpgroup copies it by TMA some
stages ahead. A thread block takes one or several such slices of a head, several if blocks are many, to spare reads of k and q.

Rounding: operands are bfloat16, sums and the carried state float32. `new` goes into the state as two bfloat16: its rounding errors
would add up where keys repeat (0.6 % of the state, 0.3 % with two).

Traffic: a chunk of a head is 80 KiB read (k, q, T and scores once per slices of a block) and 32 KiB written, and as much again as a
state, 64 KiB, where those before each chunk are kept. At 16 heads and 8,192 tokens that is 0.08 ms at 3 TB/s. With so few heads latency
rules instead: 128 chunks, one after the other, of three dependent products, 10 x 64 x 64 x 128 multiplications a slice.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attend.mosaic_gpu_forward import full, load, transposed
from pallas_kernels.gated_delta_rule.mosaic_gpu_chunks import BETA, CHUNK, KEY, PARTS, SINCE, UNTIL, across, halves

WIDTH = 64  # columns of a state that a warpgroup carries

f32, bf16 = jnp.float32, jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Tuning:
    """slices: of a head's state, WIDTH columns each, in a thread block. stages: chunks in shared memory. registers: a thread's, of
    the computing and of the copying warpgroups."""

    slices: int = 1
    stages: int = 3
    registers: tuple[int, int] = (240, 24)


def walk(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    inverse: jax.Array,
    scores: jax.Array,
    vectors: jax.Array,
    initial_state: jax.Array | None,
    keep: bool,
    tuning: Tuning,
) -> tuple[jax.Array, ...]:
    """out [B, T, H, V] bfloat16, the last state [B, H, 128, V] float32 and, if keep, those before each chunk [B, H, N, 128, V] bfloat16.

    q, k: [B, T, H, 128] and v: [B, T, H, V], bfloat16, no NaN, T a multiple of 64, V of 64 * tuning.slices.
    inverse, scores, vectors: from `chunks`. initial_state: [B, H, 128, V] float32; None is zeros.
    """
    batch, length, heads, width = v.shape
    slices, stages = tuning.slices, tuning.stages
    parts, odd = divmod(width, WIDTH * slices)
    assert k.shape[3] == KEY and length % CHUNK == 0 and not odd
    count = length // CHUNK
    started = initial_state is not None
    sideways = plgpu.Layout.WGMMA_TRANSPOSED
    by_column = plgpu.Layout.WGMMA.reduce(0)

    def kernel(refs, smem, barriers):
        q_ref, k_ref, v_ref, inverse_ref, scores_ref, vectors_ref, *refs = refs
        initial_ref = refs.pop(0) if started else None
        out_ref, last_ref, *states_ref = refs
        q_smem, k_smem, v_smem, inverse_smem, scores_smem, vectors_smem, out_smem, *states_smem = smem
        ready, free = barriers
        me = lax.axis_index("group")
        work = lax.axis_index("work")
        part, head = lax.rem(work, parts), lax.rem(lax.div(work, parts), heads)
        b = lax.div(work, parts * heads)

        def columns(i):
            return pl.ds((part * slices + i) * WIDTH, WIDTH)

        def tokens(n):
            return pl.ds(n * CHUNK, CHUNK)

        @pl.when(me < slices)
        def _compute():
            plgpu.set_max_registers(tuning.registers[0], action="increase")
            mine = columns(me)

            def accumulate(*shape):
                return plgpu.ACC(shape, f32)

            def step(n, state):
                at = lax.rem(n, stages)

                def vector(i, rows=WIDTH):
                    return across(load(vectors_smem.at[at, i], by_column, optimized=True), rows)

                rounded = state.astype(bf16)
                if keep:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    transposed(states_smem[0].at[me])[...] = plgpu.layout_cast(rounded, sideways)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(states_smem[0].at[me], states_ref[0].at[b, head, n, :, mine])
                plgpu.barrier_wait(ready.at[at])

                def read(acc):
                    plgpu.wgmma(acc, rounded, transposed(k_smem.at[at]))
                    values = load(transposed(v_smem.at[at, me]), sideways, optimized=True)
                    values = plgpu.layout_cast(values, plgpu.Layout.WGMMA).astype(f32)
                    return values, plgpu.wgmma_accumulator_load(acc)

                values, known = lax.optimization_barrier(pl.run_scoped(read, accumulate(WIDTH, CHUNK)))
                rest = (vector(BETA) * (values - vector(SINCE) * known)).astype(bf16)

                def correct(new_acc, out_acc):
                    plgpu.wgmma(new_acc, rest, transposed(inverse_smem.at[at]))
                    plgpu.wgmma(out_acc, rounded, transposed(q_smem.at[at]))
                    new = lax.optimization_barrier(plgpu.wgmma_accumulator_load(new_acc, wait_n=1))
                    high, low = lax.optimization_barrier(halves(new * vector(UNTIL)))
                    out = plgpu.wgmma_accumulator_load(out_acc, wait_n=0)
                    return lax.optimization_barrier((new, high, low, out))

                refs = accumulate(WIDTH, CHUNK), accumulate(WIDTH, CHUNK)
                new, high, low, out = pl.run_scoped(correct, *refs)
                out = out * vector(SINCE)
                new, high, low = (x.astype(bf16) for x in (new, high, low))
                state = state * vectors_smem[at, SINCE, CHUNK - 1]

                def finish(state_acc, out_acc):
                    state_acc[...], out_acc[...] = state, out
                    plgpu.wgmma(state_acc, high, k_smem.at[at])
                    plgpu.wgmma(state_acc, low, k_smem.at[at])
                    plgpu.wgmma(out_acc, new, transposed(scores_smem.at[at]))
                    state_ = plgpu.wgmma_accumulator_load(state_acc, wait_n=0)
                    return lax.optimization_barrier((state_, plgpu.wgmma_accumulator_load(out_acc, wait_n=None)))

                state, out = pl.run_scoped(finish, accumulate(WIDTH, KEY), accumulate(WIDTH, CHUNK))
                plgpu.barrier_arrive(free.at[at])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                transposed(out_smem.at[me])[...] = plgpu.layout_cast(out.astype(bf16), sideways)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[me], out_ref.at[b, tokens(n), head, mine])
                return state

            if started:
                state = load(transposed(initial_ref.at[b, head, :, mine]), sideways)
                state = plgpu.layout_cast(state, plgpu.Layout.WGMMA)
            else:
                state = full((WIDTH, KEY), 0, plgpu.Layout.WGMMA)
            state = lax.fori_loop(0, count, step, state)
            transposed(last_ref.at[b, head, :, mine])[...] = plgpu.layout_cast(state, sideways)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == slices)
        def _copy():
            plgpu.set_max_registers(tuning.registers[1], action="decrease")

            @pl.loop(0, count)
            def _(n):
                at = lax.rem(n, stages)
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[at]))

                def copy(source, target):
                    plgpu.copy_gmem_to_smem(source, target, ready.at[at])

                copy(k_ref.at[b, tokens(n), head], k_smem.at[at])
                for i in range(slices):
                    copy(v_ref.at[b, tokens(n), head, columns(i)], v_smem.at[at, i])
                copy(inverse_ref.at[b, head, n], inverse_smem.at[at])
                copy(vectors_ref.at[b, head, n], vectors_smem.at[at])
                copy(q_ref.at[b, tokens(n), head], q_smem.at[at])
                copy(scores_ref.at[b, head, n], scores_smem.at[at])

    def entry(*refs):
        def shared(*shape):
            return plgpu.SMEM(shape, bf16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))

        smem = (
            shared(stages, CHUNK, KEY),
            shared(stages, CHUNK, KEY),
            shared(stages, slices, CHUNK, WIDTH),
            shared(stages, CHUNK, CHUNK),
            shared(stages, CHUNK, CHUNK),
            plgpu.SMEM((stages, PARTS, CHUNK), f32),
            shared(slices, CHUNK, WIDTH),
            *([shared(slices, KEY, WIDTH)] if keep else []),
        )
        barriers = (
            plgpu.Barrier(num_arrivals=5 + slices, num_barriers=stages),
            plgpu.Barrier(num_arrivals=slices, num_barriers=stages),
        )
        pl.run_scoped(lambda *scratch: kernel(refs, *scratch), smem, barriers, collective_axes="group")

    kept = [jax.ShapeDtypeStruct((batch, heads, count, KEY, width), bf16)] if keep else []
    return plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct(v.shape, bf16),
            jax.ShapeDtypeStruct((batch, heads, KEY, width), f32),
            *kept,
        ],
        grid=(batch * heads * parts,),
        grid_names=("work",),
        num_threads=slices + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="gdn_walk",
    )(q, k, v, inverse, scores, vectors, *([initial_state] if started else []))
