"""Chunk scan of the gated delta rule, with the outputs: the second of two forward kernels for
Hopper GPUs, in Pallas Mosaic GPU.

Computes, chunk after chunk, in the notation of xla.py and from the results of chunks.py:

    new = T beta (V - d K S)
    out = d Q S + (Q K^T * D) new
    S'  = d_C S + (D_C K)^T new

Tiling: a thread block carries 64 columns of one head's state through the whole sequence, with three
warpgroups. The first computes only what the next chunk depends on: k S, new and S'. Its arrays are
transposed, [V, tokens] and [V, K]. The state is then an accumulator that stays in registers and,
rounded, the register operand of its own products; so is `new`. The first warpgroup passes both
through shared memory to the second, which computes the outputs in parallel. The third starts the
copies (TMA), some chunks ahead. Where these blocks would leave multiprocessors idle, the sequence
is cut into spans that are scanned in parallel, each from a state found by span_transitions.py.

Rounding: sums and the carried state are float32, operands bfloat16. T, the scores and `new` are two
bfloat16 each, because much cancels between them where keys repeat. Two products are formed with T
and K, three with the scores.

Traffic: for a chunk of a head 96 KiB read and 32 KiB written, and 64 KiB more where the states
before each chunk are saved. Every slice reads k, q, T and the scores, all but once from the L2
cache. Floor at 16 heads and 8,192 tokens: 0.09 ms of memory at 3 TB/s, 0.12 ms of tensor cores.
With so few heads latency dominates: 128 chunks in sequence, three dependent products each, 1,664
clocks of tensor work a chunk and slice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.chunks import (
    BETA,
    CHUNK,
    KEY,
    PARTS,
    SINCE,
    UNTIL,
    share,
)
from pallas_kernels.gated_delta_rule.hopper.spans import WIDTH, cut
from pallas_kernels.gated_delta_rule.tuning import HopperChunkScan as Tuning
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

HALVES = pl.ds(0, CHUNK), pl.ds(CHUNK, CHUNK)  # rows of the two parts of T and of the scores

f32, bf16 = jnp.float32, jnp.bfloat16


def chunk_scan(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    inverse: jax.Array,
    scores: jax.Array,
    vectors: jax.Array,
    starts: jax.Array | None,
    keep: bool,
) -> tuple[jax.Array, ...]:
    """out [B, T, H, V] bfloat16, the last state [B, H, 128, V] float32 and, if keep, the state
    before each chunk [B, H, N, 128, V] bfloat16.

    q, k: [B, T, H, 128] and v: [B, T, H, V], bfloat16, no NaN, T and V multiples of 64.
    inverse, scores, vectors: from `chunks`.
    starts: [B, H, S, 128, V] float32, the state before each of the S spans that `cut` makes of the
        chunks. None: one span, from zeros.
    """
    batch, length, heads, width = v.shape
    parts, odd = divmod(width, WIDTH)
    assert k.shape[3] == KEY and length % CHUNK == 0 and not odd
    count = length // CHUNK
    spans = 1 if starts is None else starts.shape[2]
    stages, out_stages = Tuning.stages, Tuning.out_stages
    started = starts is not None
    wgmma, sideways = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
    by_row = wgmma.reduce(1)

    def kernel(refs, smem, barriers):
        q_ref, k_ref, v_ref, inverse_ref, scores_ref, vectors_ref, *refs = refs
        starts_ref = refs.pop(0) if started else None
        out_ref, last_ref, *states_ref = refs
        (
            q_smem,
            k_smem,
            v_smem,
            inverse_smem,
            scores_smem,
            state_smem,
            new_smem,
            out_smem,
            vectors_smem,
        ) = smem
        (
            k_ready,
            v_ready,
            inverse_ready,
            q_ready,
            free,
            q_free,
            state_ready,
            state_free,
            new_ready,
            new_free,
        ) = barriers
        work = lax.axis_index("work")
        me = lax.axis_index("group")
        part, span = lax.rem(work, parts), lax.rem(lax.div(work, parts), spans)
        head, b = lax.rem(lax.div(work, parts * spans), heads), lax.div(work, parts * spans * heads)
        first, mine = cut(count, spans, span)
        columns = pl.ds(part * WIDTH, WIDTH)

        def tokens(n):
            return pl.ds((first + n) * CHUNK, CHUNK)

        def accumulator(rows, columns):
            return plgpu.ACC((rows, columns), f32)

        @pl.when(me == 0)
        def _carry():
            plgpu.set_max_registers(Tuning.registers[0], action="increase")

            def step(n, state):
                at = lax.rem(n, stages)

                def hand_over(rounded):
                    pl.when(n > 0)(lambda: plgpu.barrier_wait(state_free))
                    if keep:
                        transposed(state_smem)[...] = plgpu.layout_cast(rounded, sideways)
                    else:
                        state_smem[...] = rounded
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(state_ready)

                def wait_for_new():
                    pl.when(n > 0)(lambda: plgpu.barrier_wait(new_free))

                def hand_over_new(new):
                    share(new_smem, 0, new)
                    plgpu.barrier_arrive(new_ready)

                chunk = Chunk(
                    *(
                        x.at[at]
                        for x in (
                            k_smem,
                            v_smem,
                            inverse_smem,
                            vectors_smem,
                            k_ready,
                            v_ready,
                            inverse_ready,
                        )
                    )
                )
                state = advance(state, chunk, hand_over, wait_for_new, hand_over_new)
                plgpu.barrier_arrive(free.at[at])
                return state

            if started:
                state = load(transposed(starts_ref.at[b, head, span, :, columns]), sideways)
                state = plgpu.layout_cast(state, wgmma)
            else:
                state = full((WIDTH, KEY), 0, wgmma)
            state = lax.fori_loop(0, mine, step, state)
            plgpu.barrier_wait(state_free)
            plgpu.barrier_wait(new_free)
            transposed(last_ref.at[b, head, span, :, columns])[...] = plgpu.layout_cast(
                state, sideways
            )

        @pl.when(me == 1)
        def _put_out():
            plgpu.set_max_registers(Tuning.registers[1], action="decrease")

            @pl.loop(0, mine)
            def _(n):
                at, q_at = lax.rem(n, stages), lax.rem(n, out_stages)

                def read(acc):
                    products = Products()
                    plgpu.barrier_wait(q_ready.at[q_at])
                    plgpu.barrier_wait(state_ready)
                    products.add(
                        acc, q_smem.at[q_at], state_smem if keep else transposed(state_smem)
                    )
                    plgpu.barrier_wait(v_ready.at[at])
                    since = lax.optimization_barrier(
                        load(vectors_smem.at[at, SINCE], by_row, optimized=True)
                    )
                    if keep:
                        plgpu.copy_smem_to_gmem(
                            state_smem, states_ref[0].at[b, head, first + n, :, columns]
                        )
                    return since, products.wait(acc)

                since, out = lax.optimization_barrier(
                    pl.run_scoped(read, accumulator(CHUNK, WIDTH))
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(state_free)
                plgpu.commit_smem()  # the vectors are read: a copy may replace them
                plgpu.barrier_arrive(free.at[at])
                out = out * spread(since, WIDTH)
                plgpu.barrier_wait(new_ready)
                terms = (0, 0), (1, 0), (0, 1)
                out = multiply(
                    out,
                    *(
                        (scores_smem.at[q_at, HALVES[i]], transposed(new_smem.at[j]))
                        for i, j in terms
                    ),
                )
                plgpu.barrier_arrive(new_free)
                plgpu.barrier_arrive(q_free.at[q_at])
                out_smem[...] = out.astype(bf16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem, out_ref.at[b, tokens(n), head, columns])

            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == 2)
        def _copy():
            plgpu.set_max_registers(Tuning.registers[2], action="decrease")

            @pl.loop(0, mine)
            def _(n):
                def fetch(stages, free, *copies):
                    at = lax.rem(n, stages)
                    pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[at]))
                    for source, target, ready in copies:
                        plgpu.copy_gmem_to_smem(source, target.at[at], ready.at[at])

                fetch(
                    stages,
                    free,
                    (k_ref.at[b, tokens(n), head], k_smem, k_ready),
                    (v_ref.at[b, tokens(n), head, columns], v_smem, v_ready),
                    (vectors_ref.at[b, head, first + n], vectors_smem, v_ready),
                    (inverse_ref.at[b, head, first + n], inverse_smem, inverse_ready),
                )
                fetch(
                    out_stages,
                    q_free,
                    (q_ref.at[b, tokens(n), head], q_smem, q_ready),
                    (scores_ref.at[b, head, first + n], scores_smem, q_ready),
                )

    def entry(*refs):
        def shared(*shape):
            return plgpu.SMEM(
                shape,
                bf16,
                transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
            )

        smem = (
            shared(out_stages, CHUNK, KEY),
            shared(stages, CHUNK, KEY),
            shared(stages, CHUNK, WIDTH),
            shared(stages, 2 * CHUNK, CHUNK),
            shared(out_stages, 2 * CHUNK, CHUNK),
            shared(KEY, WIDTH) if keep else shared(WIDTH, KEY),
            shared(2, WIDTH, CHUNK),
            shared(CHUNK, WIDTH),
            plgpu.SMEM((stages, PARTS, CHUNK), f32),
        )
        barriers = (
            *(plgpu.Barrier(num_arrivals=copies, num_barriers=stages) for copies in (1, 2, 1)),
            plgpu.Barrier(num_arrivals=2, num_barriers=out_stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_barriers=out_stages),
            *(plgpu.Barrier() for _ in range(4)),
        )
        pl.run_scoped(
            lambda *scratch: kernel(refs, *scratch), smem, barriers, collective_axes="group"
        )

    kept = [jax.ShapeDtypeStruct((batch, heads, count, KEY, width), bf16)] if keep else []
    out, last, *states = plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct(v.shape, bf16),
            jax.ShapeDtypeStruct((batch, heads, spans, KEY, width), f32),
            *kept,
        ],
        grid=(batch * heads * spans * parts,),
        grid_names=("work",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="gdn_chunk_scan",
    )(q, k, v, inverse, scores, vectors, *([starts] if started else []))
    return out, last[:, :, -1], *states


class Chunk(NamedTuple):
    """What the state needs of a chunk, in shared memory, and the barriers at which it arrives (the
    vectors arrive with v)."""

    k: Any
    v: Any
    inverse: Any
    vectors: Any
    k_ready: Any
    v_ready: Any
    inverse_ready: Any


def advance(
    state: jax.Array,
    chunk: Chunk,
    reading: Callable[[jax.Array], None],
    before_new: Callable[[], None],
    adding: Callable[[jax.Array], None],
    share_of_v: jax.Array | None = None,
) -> jax.Array:
    """The state after a chunk from the state before it. Both are transposed, [64 columns, 128]
    float32 in registers of a warpgroup.

    The callbacks are called while a product runs.

    reading: gets the state before the chunk, rounded to bfloat16.
    before_new: returns once others have read `new` of the previous chunk.
    adding: gets `new` [64 columns, tokens].
    share_of_v: 1, or 0 for a state that runs with V = 0.
    """

    def vector(i):
        return across(load(chunk.vectors.at[i], by_column, optimized=True), WIDTH)

    wgmma, sideways = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
    by_column = wgmma.reduce(0)
    rounded = state.astype(bf16)
    plgpu.barrier_wait(chunk.k_ready)

    def read(acc):
        products = Products()
        products.add(acc, rounded, transposed(chunk.k))
        reading(rounded)
        plgpu.barrier_wait(chunk.v_ready)
        values = load(transposed(chunk.v), sideways, optimized=True)
        values = plgpu.layout_cast(values, wgmma).astype(f32) * vector(BETA)
        if share_of_v is not None:
            values *= share_of_v
        factor = load(chunk.vectors.at[BETA], by_column, optimized=True)
        factor *= load(chunk.vectors.at[SINCE], by_column, optimized=True)
        values, factor = lax.optimization_barrier((values, factor))
        # The compiler moves no work past the loop of this wait. It would move this work past the
        # wait for the product.
        plgpu.barrier_wait(chunk.inverse_ready)
        return values, factor, products.wait(acc)

    values, factor, known = lax.optimization_barrier(
        pl.run_scoped(read, plgpu.ACC((WIDTH, CHUNK), f32))
    )
    rest = (values - across(factor, WIDTH) * known).astype(bf16)

    def correct(acc):
        products = Products()
        for half in HALVES:
            products.add(acc, rest, transposed(chunk.inverse.at[half]))
        until = lax.optimization_barrier(load(chunk.vectors.at[UNTIL], by_column, optimized=True))
        decayed = lax.optimization_barrier(state * chunk.vectors[SINCE, CHUNK - 1])
        before_new()
        return decayed, until, products.wait(acc)

    decayed, until, new = lax.optimization_barrier(
        pl.run_scoped(correct, plgpu.ACC((WIDTH, CHUNK), f32))
    )
    high, low = rounded_halves(new * across(until, WIDTH))

    def add(acc):
        acc[...] = decayed
        products = Products()
        products.add(acc, high, chunk.k)
        products.add(acc, low, chunk.k)
        adding(new)
        return products.wait(acc)

    return lax.optimization_barrier(pl.run_scoped(add, plgpu.ACC((WIDTH, KEY), f32)))
