"""Transitions of the state through spans of a sequence, for Hopper GPUs: the kernel before the
chunk scan where spans.py cuts the sequence.

A span maps the state S to A S + B. The kernel computes, chunk after chunk and in the notation of
xla.py, new = T beta (V - d K S) and S' = d_C S + (D_C K)^T new, for all spans but the last. The
first span runs from the known state. The others run twice: from S = 0, which gives B, and from the
identity with V = 0, which gives A.

Tiling: a thread block takes 64 columns through a span as in chunk_scan.py, but without outputs. One
warpgroup carries the state, the other starts the copies (TMA).

Traffic: for a chunk of a head k and T (32 KiB) once per 64 columns, all but once from the L2 cache,
and v. 192 KiB written for a span of a head with V 256: 12 MB or 4 us at 3 TB/s for 4 heads in 6
spans of 8,192 tokens. Floor: latency, as in the chunk scan: the chunks of a span in sequence, three
dependent products each.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.chunk_scan import Chunk, advance
from pallas_kernels.gated_delta_rule.hopper.chunks import CHUNK, KEY, PARTS
from pallas_kernels.gated_delta_rule.hopper.spans import WIDTH, cut, place, transition_blocks
from pallas_kernels.gated_delta_rule.tuning import HopperSpanTransitions as Tuning
from pallas_kernels.mosaic_gpu import load, transposed

f32, bf16 = jnp.float32, jnp.bfloat16


def span_transitions(
    k: jax.Array,
    v: jax.Array,
    inverse: jax.Array,
    vectors: jax.Array,
    initial_state: jax.Array,
    spans: int,
) -> jax.Array:
    """The argument of `compose`, [B, H, spans - 1, 128, V + 128] float32: for the first span the
    state after it (the last 128 columns are not written), for the others except the last B and A.

    k: [B, T, H, 128] and v: [B, T, H, V], bfloat16, no NaN, T and V multiples of 64.
    inverse, vectors: from `chunks`.
    initial_state: [B, H, 128, V] float32.
    """
    batch, length, heads, width = v.shape
    parts, odd = divmod(width, WIDTH)
    assert k.shape[3] == KEY and length % CHUNK == 0 and not odd and spans > 1
    count, blocks = length // CHUNK, transition_blocks(spans, parts)
    wgmma, sideways = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED

    def kernel(refs, smem, barriers):
        k_ref, v_ref, inverse_ref, vectors_ref, initial_ref, transitions_ref = refs
        k_smem, v_smem, inverse_smem, vectors_smem = smem
        k_ready, v_ready, inverse_ready, free = barriers
        work, me = lax.axis_index("work"), lax.axis_index("group")
        block, head = lax.rem(work, blocks), lax.rem(lax.div(work, blocks), heads)
        b = lax.div(work, blocks * heads)
        span, part = place(block, parts)
        first, mine = cut(count, spans, span)
        has_values = part < parts
        columns = pl.ds(jnp.minimum(part, parts - 1) * WIDTH, WIDTH)

        @pl.when(me == 0)
        def _carry():
            plgpu.set_max_registers(Tuning.registers[0], action="increase")
            share_of_v = has_values.astype(f32)

            def step(n, state):
                at = lax.rem(n, Tuning.stages)
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
                state = advance(
                    state, chunk, lambda _: None, lambda: None, lambda _: None, share_of_v
                )
                plgpu.barrier_arrive(free.at[at])
                return state

            known = plgpu.layout_cast(
                load(transposed(initial_ref.at[b, head, :, columns]), sideways), wgmma
            )
            state = entering(known, span, part, parts)
            state = lax.fori_loop(0, mine, step, state)
            target = transitions_ref.at[b, head, span, :, pl.ds(part * WIDTH, WIDTH)]
            transposed(target)[...] = plgpu.layout_cast(state, sideways)

        @pl.when(me == 1)
        def _copy():
            plgpu.set_max_registers(Tuning.registers[1], action="decrease")

            @pl.loop(0, mine)
            def _(n):
                at = lax.rem(n, Tuning.stages)
                tokens = pl.ds((first + n) * CHUNK, CHUNK)
                pl.when(n >= Tuning.stages)(lambda: plgpu.barrier_wait(free.at[at]))
                for source, target, ready in (
                    (k_ref.at[b, tokens, head], k_smem, k_ready),
                    (v_ref.at[b, tokens, head, columns], v_smem, v_ready),
                    (vectors_ref.at[b, head, first + n], vectors_smem, v_ready),
                    (inverse_ref.at[b, head, first + n], inverse_smem, inverse_ready),
                ):
                    plgpu.copy_gmem_to_smem(source, target.at[at], ready.at[at])

    def entry(*refs):
        def shared(*shape):
            return plgpu.SMEM(
                (Tuning.stages, *shape),
                bf16,
                transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
            )

        smem = (
            shared(CHUNK, KEY),
            shared(CHUNK, WIDTH),
            shared(2 * CHUNK, CHUNK),
            plgpu.SMEM((Tuning.stages, PARTS, CHUNK), f32),
        )
        barriers = tuple(
            plgpu.Barrier(num_arrivals=copies, num_barriers=Tuning.stages)
            for copies in (1, 2, 1, 1)
        )
        pl.run_scoped(
            lambda *scratch: kernel(refs, *scratch), smem, barriers, collective_axes="group"
        )

    return plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct((batch, heads, spans - 1, KEY, width + KEY), f32),
        grid=(batch * heads * blocks,),
        grid_names=("work",),
        num_threads=2,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="gdn_span_transitions",
    )(k, v, inverse, vectors, initial_state)


def entering(known, span, part, parts: int):
    """The transposed state [64 columns, 128] from which a thread block starts: the known state in
    the first span, zeros or columns of the identity in the others."""
    column, key = (
        plgpu.broadcasted_iota(jnp.int32, (WIDTH, KEY), i, layout=plgpu.Layout.WGMMA)
        for i in (0, 1)
    )
    # All zeros for the first `parts`.
    identity = (key == column + (part - parts) * WIDTH).astype(f32)
    return jnp.where(key < jnp.where(span == 0, KEY, 0), known, identity)
