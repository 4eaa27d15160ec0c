"""Backward chunk scan of the gated delta rule: the first of two backward kernels for Hopper GPUs,
in Pallas Mosaic GPU.

Computes, from the last chunk to the first and in the notation of xla.py, with dS' the gradient of
the state after the chunk:

    d_new = (Q K^T * D)^T d_out + (D_C K) dS'
    x     = T^T d_new, the gradient of beta (V - d K S)
    dS    = d_C dS' + (d Q)^T d_out - (beta d K)^T x

It writes x and dS', the only sequential results that gradients.py needs.

Tiling: a thread block takes 64 columns of one head's state. One warpgroup carries dS through the
whole sequence. Its arrays are transposed, [V, tokens] and [V, K]. dS is then an accumulator that
stays in registers and, rounded, the register operand of its own products; so are d_new and x. A
second warpgroup computes the scores and d Q, which depend on no state, one chunk ahead. A third
starts the copies (TMA). Where these blocks would leave multiprocessors idle, the sequence is cut
into spans (spans.py) that are scanned in parallel. `span_transitions_backward` runs before that. It
is the same scan without the per-chunk results: it reads as much of q, k, d_out and T, and writes
192 KiB for a span of a head with V 256.

Rounding: operands are bfloat16, sums and the carried gradient float32. The product of d_new and T
takes d_new as two bfloat16: where keys repeat, its rounding errors would grow (2 % of dv, 1.3 %
with two). T in two parts halves that again (0.6 %).

Traffic: for a chunk of a head 32 KiB of d_out, and q, k and T once per 64 columns (160 KiB, from
the L2 cache) read, 96 KiB written: 0.1 ms at 16 heads and 8,192 tokens. Floor: 0.1 ms too, by
latency: 128 chunks in sequence, three dependent products each, 1,150 clocks of tensor core a chunk
(1,280 with T in two parts). Measured on an H100 with T in two parts: 0.25 ms, 2,900 clocks a chunk.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.span_transitions import entering
from pallas_kernels.gated_delta_rule.hopper.spans import KEY, WIDTH, cut, place, transition_blocks
from pallas_kernels.gated_delta_rule.tuning import HopperChunkScanBackward as Tuning
from pallas_kernels.mosaic_gpu import (
    Products,
    across,
    load,
    multiply,
    rounded_halves,
    spread,
    transposed,
)

CHUNK = 64  # tokens of a chunk
SUM, SINCE, BETA, UNTIL, SEGMENT, ROWS = range(6)  # rows of a chunk's vectors
AHEAD, STAGES = Tuning.ahead, Tuning.stages

f32, bf16 = jnp.float32, jnp.bfloat16


def chunk_scan_backward(
    q: jax.Array,
    k: jax.Array,
    d_out: jax.Array,
    inverse: jax.Array,
    vectors: jax.Array,
    d_ends: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, H, N, 64, V] bfloat16, the gradient of the state after each of the N chunks, transposed
    [B, H, N, V, 128] bfloat16, and that of the initial state [B, H, 128, V] float32.

    q, k: [B, T, H, 128], d_out: [B, T, H, V], bfloat16, no NaN, T and V multiples of 64.
    inverse: [B, H, N, 1 or 2, 64, 64] bfloat16, T or two parts of it.
    vectors: [B, H, N, ROWS, 64] float32: running sum of g in the chunk, decay d from the state
        before it, beta, decay to the chunk's last token, number of the token's sequence. Both
        decays are 0 for tokens of other sequences.
    d_ends: [B, H, S, 128, V] float32, the gradient of the state after each of the S spans that
        `cut` makes of the chunks, the last span's first.
    """
    x, d_states, d_first = _chunk_scan_backward(q, k, d_out, inverse, vectors, d_ends, None)
    return x, d_states, d_first[:, :, -1]


def span_transitions_backward(
    q: jax.Array,
    k: jax.Array,
    d_out: jax.Array,
    inverse: jax.Array,
    vectors: jax.Array,
    d_last: jax.Array,
    spans: int,
) -> jax.Array:
    """The argument of `compose`, [B, H, spans - 1, 128, V + 128] float32, with spans counted from
    the last.

    d_last: [B, H, 128, V] float32. The other arguments are those of `chunk_scan_backward`.
    """
    (transitions,) = _chunk_scan_backward(q, k, d_out, inverse, vectors, d_last[:, :, None], spans)
    return transitions


def _chunk_scan_backward(q, k, d_out, inverse, vectors, d_ends, transition_spans):
    batch, length, heads, width = d_out.shape
    slices, odd = divmod(width, WIDTH)
    assert k.shape[3] == KEY and length % CHUNK == 0 and not odd
    count, parts = length // CHUNK, inverse.shape[3]
    transitions_only = transition_spans is not None
    spans = transition_spans if transitions_only else d_ends.shape[2]
    blocks = transition_blocks(spans, slices) if transitions_only else spans * slices  # of a head
    wgmma, sideways = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED
    by_row, by_column = wgmma.reduce(1), wgmma.reduce(0)

    def kernel(refs, smem, barriers):
        q_ref, k_ref, do_ref, inverse_ref, vectors_ref, ends_ref, *others, first_ref = refs
        q_smem, k_smem, do_smem, t_smem, vectors_smem, scores_smem, reads_smem, *staging = smem
        q_ready, k_ready, t_ready, made, q_free, k_free, t_free, used = barriers
        me = lax.axis_index("group")
        work = lax.axis_index("work")
        block, head = lax.rem(work, blocks), lax.rem(lax.div(work, blocks), heads)
        b = lax.div(work, blocks * heads)
        # Spans count from the last.
        span, slice_ = (
            place(block, slices)
            if transitions_only
            else (lax.div(block, slices), lax.rem(block, slices))
        )
        first, chunks = cut(count, spans, spans - 1 - span)
        mine = pl.ds(slice_ * WIDTH, WIDTH)
        columns = pl.ds(jnp.minimum(slice_, slices - 1) * WIDTH, WIDTH)
        if transitions_only:
            (zeros_ref,) = others
        else:
            (x_ref, ds_ref), (x_smem, ds_smem) = others, staging

        @pl.when(me == 0)
        def _carry():
            plgpu.set_max_registers(Tuning.registers[0], action="increase")

            def step(i, ds):
                early, late = lax.rem(i, AHEAD), lax.rem(i, STAGES)
                n = first + chunks - 1 - i
                k_, do_ = k_smem.at[late], do_smem.at[late]

                def vector(which):
                    return across(
                        load(vectors_smem.at[late, which], by_column, optimized=True), CHUNK
                    )

                rounded = ds.astype(bf16)
                plgpu.barrier_wait(k_ready.at[late])
                plgpu.barrier_wait(made.at[early])

                # Other work runs beside the products, except for narrowing to bfloat16. ptxas makes
                # every wgmma wait for the last one if the operand registers of one are written
                # while another is in flight (its message C7513).
                def gather(far_acc, near_acc):
                    products = Products()
                    products.add(far_acc, rounded, transposed(k_))
                    products.add(near_acc, transposed(do_), scores_smem.at[early])
                    if not transitions_only:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        ds_smem[...] = rounded
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(ds_smem, ds_ref.at[b, head, n, mine])
                    decayed = ds * vectors_smem[late, SINCE, CHUNK - 1]
                    decayed, until, factor = lax.optimization_barrier(
                        (decayed, vector(UNTIL), -vector(BETA) * vector(SINCE))
                    )
                    far = products.wait(far_acc)
                    return lax.optimization_barrier(
                        (far, products.take(near_acc), decayed, until, factor)
                    )

                refs = plgpu.ACC((WIDTH, CHUNK), f32), plgpu.ACC((WIDTH, CHUNK), f32)
                far, near, ds, until, factor = pl.run_scoped(gather, *refs)
                high, low = rounded_halves(far * until + near)
                plgpu.barrier_wait(t_ready.at[early])

                def solve(x_acc, ds_acc):
                    ds_acc[...] = ds
                    products = Products()
                    products.add(x_acc, high, t_smem.at[early, 0])
                    products.add(x_acc, low, t_smem.at[early, 0])
                    if parts == 2:
                        products.add(x_acc, high, t_smem.at[early, 1])
                    products.add(ds_acc, transposed(do_), reads_smem.at[early])
                    x = products.wait(x_acc, running=1)
                    return lax.optimization_barrier((x, x * factor, products.wait(ds_acc)))

                x, written, ds = pl.run_scoped(
                    solve, plgpu.ACC((WIDTH, CHUNK), f32), plgpu.ACC((WIDTH, KEY), f32)
                )
                plgpu.barrier_arrive(used.at[early])
                plgpu.barrier_arrive(t_free.at[early])
                written = written.astype(bf16)

                def write(acc):
                    acc[...] = ds
                    products = Products()
                    products.add(acc, written, k_)
                    if not transitions_only:
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        transposed(x_smem)[...] = plgpu.layout_cast(x.astype(bf16), sideways)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(x_smem, x_ref.at[b, head, n, :, mine])
                    return products.wait(acc)

                ds = lax.optimization_barrier(pl.run_scoped(write, plgpu.ACC((WIDTH, KEY), f32)))
                plgpu.barrier_arrive(k_free.at[late])
                return ds

            ds = load(
                transposed(ends_ref.at[b, head, 0 if transitions_only else span, :, columns]),
                sideways,
            )
            ds = plgpu.layout_cast(ds, wgmma)
            if transitions_only:
                ds = entering(ds, span, slice_, slices)
            ds = lax.fori_loop(0, chunks, step, ds)
            transposed(first_ref.at[b, head, span, :, mine])[...] = plgpu.layout_cast(ds, sideways)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == 1)
        def _prepare():
            plgpu.set_max_registers(Tuning.registers[0], action="increase")
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), i, layout=wgmma) for i in (0, 1)
            )

            @pl.loop(0, chunks)
            def _(i):
                early, late = lax.rem(i, AHEAD), lax.rem(i, STAGES)
                vector = vectors_smem.at[late]
                plgpu.barrier_wait(k_ready.at[late])
                plgpu.barrier_wait(q_ready.at[early])

                scores = multiply((CHUNK, CHUNK), (q_smem.at[early], transposed(k_smem.at[late])))
                scores = (scores * decays(vector, row, column)).astype(bf16)
                reads = q_smem.at[early][...].astype(f32) * spread(
                    load(vector.at[SINCE], by_row), KEY
                )
                pl.when(i >= AHEAD)(lambda: plgpu.barrier_wait(used.at[early]))
                scores_smem.at[early][...] = scores
                reads_smem.at[early][...] = reads.astype(bf16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(made.at[early])
                plgpu.barrier_arrive(q_free.at[early])
                plgpu.barrier_arrive(k_free.at[late])

        @pl.when(me == 2)
        def _copy():
            plgpu.set_max_registers(Tuning.registers[1], action="decrease")

            @pl.loop(0, chunks)
            def _(i):
                early, late = lax.rem(i, AHEAD), lax.rem(i, STAGES)
                n = first + chunks - 1 - i
                tokens = pl.ds(n * CHUNK, CHUNK)
                pl.when(i >= STAGES)(lambda: plgpu.barrier_wait(k_free.at[late]))
                plgpu.copy_gmem_to_smem(
                    k_ref.at[b, tokens, head], k_smem.at[late], k_ready.at[late]
                )

                def copy_d_out(source):
                    plgpu.copy_gmem_to_smem(source, do_smem.at[late], k_ready.at[late])

                if transitions_only:
                    pl.when(slice_ < slices)(
                        lambda: copy_d_out(do_ref.at[b, tokens, head, columns])
                    )
                    pl.when(slice_ >= slices)(lambda: copy_d_out(zeros_ref))
                else:
                    copy_d_out(do_ref.at[b, tokens, head, columns])
                plgpu.copy_gmem_to_smem(
                    vectors_ref.at[b, head, n], vectors_smem.at[late], k_ready.at[late]
                )
                pl.when(i >= AHEAD)(lambda: plgpu.barrier_wait(q_free.at[early]))
                plgpu.copy_gmem_to_smem(
                    q_ref.at[b, tokens, head], q_smem.at[early], q_ready.at[early]
                )
                pl.when(i >= AHEAD)(lambda: plgpu.barrier_wait(t_free.at[early]))
                for p in range(parts):
                    plgpu.copy_gmem_to_smem(
                        inverse_ref.at[b, head, n, p], t_smem.at[early, p], t_ready.at[early]
                    )

    def entry(*refs):
        def shared(*shape):
            return plgpu.SMEM(
                shape,
                bf16,
                transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
            )

        smem = (
            shared(AHEAD, CHUNK, KEY),
            shared(STAGES, CHUNK, KEY),
            shared(STAGES, CHUNK, WIDTH),
            shared(AHEAD, parts, CHUNK, CHUNK),
            plgpu.SMEM((STAGES, ROWS, CHUNK), f32),
            shared(AHEAD, CHUNK, CHUNK),
            shared(AHEAD, CHUNK, KEY),
            *([] if transitions_only else (shared(CHUNK, WIDTH), shared(WIDTH, KEY))),
        )
        barriers = (
            plgpu.Barrier(num_barriers=AHEAD),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=parts, num_barriers=AHEAD),
            plgpu.Barrier(num_barriers=AHEAD),
            plgpu.Barrier(num_barriers=AHEAD),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_barriers=AHEAD),
            plgpu.Barrier(num_barriers=AHEAD),
        )
        pl.run_scoped(
            lambda *scratch: kernel(refs, *scratch), smem, barriers, collective_axes="group"
        )

    if transitions_only:
        results = [jax.ShapeDtypeStruct((batch, heads, spans - 1, KEY, width + KEY), f32)]
        others = [jnp.zeros((CHUNK, WIDTH), bf16)]
    else:
        results = [
            jax.ShapeDtypeStruct((batch, heads, count, CHUNK, width), bf16),
            jax.ShapeDtypeStruct((batch, heads, count, width, KEY), bf16),
            jax.ShapeDtypeStruct((batch, heads, spans, KEY, width), f32),
        ]
        others = []
    return plgpu.kernel(
        entry,
        out_type=results,
        grid=(batch * heads * blocks,),
        grid_names=("work",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="gdn_span_transitions_backward"
        if transitions_only
        else "gdn_chunk_scan_backward",
    )(q, k, d_out, inverse, vectors, d_ends, *others)


def decays(vector, row, column):
    """D of a chunk, in registers, from its vectors in shared memory."""
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    exponent = spread(load(vector.at[SUM], by_row), CHUNK) - across(
        load(vector.at[SUM], by_column), CHUNK
    )
    same = spread(load(vector.at[SEGMENT], by_row), CHUNK) == across(
        load(vector.at[SEGMENT], by_column), CHUNK
    )
    return jnp.exp(jnp.where((column <= row) & same, exponent, -jnp.inf))
