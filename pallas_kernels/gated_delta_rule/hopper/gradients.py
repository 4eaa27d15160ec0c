"""The gradients of every chunk at once: the second of two backward kernels for Hopper GPUs, in
Pallas Mosaic GPU.

In the notation of xla.py, with S the state before the chunk, dS' the gradient of the state after it
and x that of beta (V - d K S), the last two from chunk_scan_backward.py, all that is left is sums
over tokens of the chunk and over the state:

    new = T beta (V - d K S)             dP = d_out new^T              dA = -x new^T below the
    diagonal dv  = beta x                         dbeta = x.(V - d K S) + sum_j dA_ij k_i.k_j D_ij
    dq  = d (d_out S^T) + (dP * D) K     dk = -beta d (x S^T) + D_C (new dS'^T) + (X + X^T) K + (dP
    * D)^T Q,  X = beta dA * D dg_t = d_C S.dS' + the sum of all E_ij with i >= t > j (below), and
    of F_i = d q.(d_out S^T) - beta d k.(x S^T) with i >= t

where E = dP * D * (Q K^T) + X * (K K^T), to whose last row D_C k.(new dS'^T) is added. No column
and row sums are subtracted: dg is often far smaller than E. F stands in the last column of E, which
is empty, and one product with a triangle of ones sums everything.

Tiling: a thread block takes chunk after chunk, the state 64 columns at a time. One warpgroup makes
`new` and what belongs to queries (dP, d_out S^T, then dq), another what belongs to keys (dA, x S^T,
new dS'^T, S.dS', then dk); a third starts the copies (TMA), the next chunk's included.

Rounding: operands are bfloat16, sums float32. E, `new` in dP and dA, and dP * D in dq are two
bfloat16 each: where keys resemble each other these sums cancel and rounding errors do not (dq 2.4 %
off with one, and T cut off rather than rounded; 0.5 % so). Both dP and dA take the same `new`, for
dg is a difference of theirs.

What is written goes through shared memory and the copy engine, and nobody waits for it but where
the place is needed again: after a plain store to global memory the fence before the next product's
operands lasts as long as the store (thousands of clocks).

Traffic: a chunk of a head is 264 KiB read and 66 KiB written with V 256. Floor: that, 0.22 ms at 16
heads, 8,192 tokens and 3 TB/s; its 77 products of 64 x 64 x 64 are 0.08 ms of tensor core. Measured
on an H100: 0.39 ms, most of the rest of it waits for slices, of which only two fit.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.chunk_scan_backward import (
    BETA,
    CHUNK,
    ROWS,
    SINCE,
    UNTIL,
    decays,
)
from pallas_kernels.gated_delta_rule.hopper.spans import KEY, WIDTH
from pallas_kernels.gated_delta_rule.tuning import HopperGradients as Tuning
from pallas_kernels.hardware import HOPPER_MULTIPROCESSORS
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

D_BETA, PRODUCT, D_GATE, D_BETA_TOO, SUMS = range(5)  # rows of what is summed for each token
STAGES = Tuning.stages

f32, bf16 = jnp.float32, jnp.bfloat16


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    inverse: jax.Array,
    states: jax.Array,
    x: jax.Array,
    d_states: jax.Array,
    vectors: jax.Array,
) -> tuple[jax.Array, ...]:
    """dq, dk [B, T, H, 128] and dv [B, T, H, V], bfloat16, and sums [B, H, N, SUMS, 64] float32:
    two parts of dbeta, dg but for d_C S.dS', and 64 parts of S.dS'.

    q, k, v, d_out, inverse and vectors as in `chunk_scan_backward`, x and d_states from there;
    states: [B, H, N, 128, V] bfloat16, that before each chunk.
    """
    batch, length, heads, width = v.shape
    slices, odd = divmod(width, WIDTH)
    assert k.shape[3] == KEY and length % CHUNK == 0 and not odd
    count = length // CHUNK
    items = batch * heads * count
    blocks = min(items, HOPPER_MULTIPROCESSORS)
    wgmma = plgpu.Layout.WGMMA
    by_row, by_column = wgmma.reduce(1), wgmma.reduce(0)
    square, wide = (CHUNK, CHUNK), (CHUNK, KEY)
    last = CHUNK - 1

    def kernel(refs, smem, barriers):
        (
            q_ref,
            k_ref,
            v_ref,
            do_ref,
            t_ref,
            s_ref,
            x_ref,
            ds_ref,
            vectors_ref,
            zero_ref,
            dq_ref,
            dk_ref,
            dv_ref,
            sums_ref,
        ) = refs
        q_smem, k_smem, t_smem, vectors_smem, v_smem, do_smem, x_smem, s_smem, ds_smem = smem[:9]
        work_smem, new_smem, sums_smem, row_smem = smem[9:]
        chunk_ready, chunk_free, q_ready, q_free, slice_ready, slice_free, *barriers = barriers
        new_ready, new_free, scores_ready, scores_read, k_read = barriers
        me = lax.axis_index("group")
        first = lax.axis_index("work")
        mine = lax.div(items - 1 - first, blocks) + 1

        def place(j):
            item = first + j * blocks
            return (
                lax.div(item, count * heads),
                lax.rem(item, heads),
                lax.rem(lax.div(item, heads), count),
            )  # rows of all heads together

        def columns(s):
            return pl.ds(s * WIDTH, WIDTH)

        @pl.when(me == 0)
        def _queries():
            plgpu.set_max_registers(Tuning.registers[0], action="increase")
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, square, i, layout=wgmma) for i in (0, 1)
            )

            @pl.loop(0, mine)
            def _(j):
                b, head, n = place(j)
                tokens = pl.ds(n * CHUNK, CHUNK)
                at = lax.rem(j, STAGES)
                k_, t_, vector = k_smem.at[at], t_smem.at[at], vectors_smem.at[at]
                plgpu.barrier_wait(chunk_ready.at[at])

                def of_row(which):
                    return load(vector.at[which], by_row)

                def share(p, tile):
                    there = lax.rem(p, STAGES)
                    pl.when(p >= STAGES)(lambda: plgpu.barrier_wait(new_free.at[there]))
                    for i, half in enumerate(rounded_halves(tile)):
                        new_smem.at[there, i][...] = half
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(new_ready.at[there])

                def step(s, carry):
                    reads, d_scores, product, d_beta = carry
                    c, p = j * slices + s, j * (slices + 1) + s
                    here, there = lax.rem(c, STAGES), lax.rem(p, STAGES)
                    plgpu.barrier_wait(slice_ready.at[here])

                    def read(known_acc, reads_acc, product_acc):
                        reads_acc[...], product_acc[...] = reads, product
                        products = Products()
                        products.add(known_acc, k_, s_smem.at[here])
                        products.add(reads_acc, do_smem.at[here], transposed(s_smem.at[here]))
                        products.add(product_acc, ds_smem.at[here], s_smem.at[here])
                        known = products.wait(known_acc, running=2)
                        rest = (
                            v_smem.at[here][...].astype(f32) - spread(of_row(SINCE), WIDTH) * known
                        )
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                        @pl.when((s == 0) & (j > 0))
                        def _():
                            plgpu.barrier_arrive(q_free)
                            plgpu.barrier_arrive(chunk_free.at[1 - at])

                        work_smem[...] = (spread(of_row(BETA), WIDTH) * rest).astype(bf16)
                        plgpu.commit_smem()
                        more = jnp.sum(x_smem.at[here][...].astype(f32) * rest, axis=1)
                        return lax.optimization_barrier(
                            (products.wait(reads_acc), products.take(product_acc), more)
                        )

                    refs = (plgpu.ACC(shape, f32) for shape in (square, wide, square))
                    reads, product, more = pl.run_scoped(read, *refs)
                    share(p, multiply(square, (t_, work_smem)))
                    work_smem[...] = (
                        spread(of_row(BETA), WIDTH) * x_smem.at[here][...].astype(f32)
                    ).astype(bf16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(work_smem, dv_ref.at[b, tokens, head, columns(s)])
                    d_scores = multiply(
                        d_scores,
                        *((do_smem.at[here], transposed(new_smem.at[there, i])) for i in range(2)),
                    )
                    plgpu.barrier_arrive(slice_free.at[here])
                    return reads, d_scores, product, d_beta + more

                start = (
                    *(full(shape, 0, wgmma) for shape in (wide, square, square)),
                    full((CHUNK,), 0, by_row),
                )
                reads, d_scores, product, d_beta = lax.fori_loop(0, slices, step, start)

                d_gram = d_scores * decays(vector, row, column)
                high, low = rounded_halves(d_gram)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                t_[...], work_smem[...] = high, low  # T and dv have done their work
                plgpu.commit_smem()
                plgpu.barrier_arrive(scores_ready)
                sums_smem[D_BETA] = d_beta
                sums_smem[PRODUCT] = jnp.sum(jnp.where(column == row, product, 0.0), axis=1)
                plgpu.barrier_wait(q_ready)
                gates = jnp.where(
                    column < row, d_gram * multiply(square, (q_smem, transposed(k_))), 0.0
                )
                since = of_row(SINCE)
                from_state = since * jnp.sum(q_smem[...].astype(f32) * reads, axis=1)
                share(
                    j * (slices + 1) + slices,
                    jnp.where(column == last, spread(from_state, CHUNK), gates),
                )
                dq = multiply(spread(since, KEY) * reads, (t_, k_), (work_smem, k_))
                plgpu.barrier_arrive(k_read)
                plgpu.barrier_wait(scores_read)
                # In place of q, which is free once it is copied; nobody waits for that before the
                # next chunk.
                q_smem[...] = dq.astype(bf16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[b, tokens, head])
                plgpu.copy_smem_to_gmem(
                    sums_smem.at[pl.ds(D_BETA, 2)], sums_ref.at[b, head, n, pl.ds(D_BETA, 2)]
                )

            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == 1)
        def _keys():
            plgpu.set_max_registers(Tuning.registers[0], action="increase")
            row, column = (
                plgpu.broadcasted_iota(jnp.int32, square, i, layout=wgmma) for i in (0, 1)
            )
            # Not a constant: some elements of `later`, the register factor below, would be known to
            # the compiler (`Products`).
            later = jnp.where(column >= row + zero_ref[0], 1.0, 0.0).astype(bf16)

            @pl.loop(0, mine)
            def _(j):
                b, head, n = place(j)
                at = lax.rem(j, STAGES)
                k_, vector = k_smem.at[at], vectors_smem.at[at]
                plgpu.barrier_wait(chunk_ready.at[at])

                def of_row(which):
                    return load(vector.at[which], by_row)

                def step(s, carry):
                    c, p = j * slices + s, j * (slices + 1) + s
                    here, there = lax.rem(c, STAGES), lax.rem(p, STAGES)
                    x_, s_, ds_, new_ = (
                        x_smem.at[here],
                        s_smem.at[here],
                        ds_smem.at[here],
                        new_smem.at[there],
                    )

                    def run(*sums):
                        for acc, start in zip(sums, carry, strict=True):
                            acc[...] = start
                        writes, keeps, d_a = sums
                        products = Products()
                        plgpu.barrier_wait(slice_ready.at[here])
                        products.add(writes, x_, transposed(s_))
                        plgpu.barrier_wait(new_ready.at[there])
                        products.add(keeps, new_.at[0], ds_)
                        for i in range(2):
                            products.add(d_a, x_, transposed(new_.at[i]))
                        return lax.optimization_barrier(
                            (products.wait(writes), products.take(keeps), products.take(d_a))
                        )

                    carry = pl.run_scoped(
                        run, *(plgpu.ACC(shape, f32) for shape in (wide, wide, square))
                    )
                    plgpu.barrier_arrive(slice_free.at[here])
                    plgpu.barrier_arrive(new_free.at[there])

                    @pl.when((s == 0) & (j > 0))
                    def _():
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        plgpu.barrier_arrive(chunk_free.at[1 - at])

                    return carry

                start = tuple(full(shape, 0, wgmma) for shape in (wide, wide, square))
                writes, keeps, d_a = lax.fori_loop(0, slices, step, start)

                beta, until = of_row(BETA), of_row(UNTIL)
                back = -beta * of_row(SINCE)
                keys = k_[...].astype(f32)
                from_state = back * jnp.sum(keys * writes, axis=1)
                row_smem[...] = until * jnp.sum(keys * keeps, axis=1)
                dk = spread(back, KEY) * writes + spread(until, KEY) * keeps

                def early(dk_acc, gram_acc):
                    dk_acc[...] = dk
                    products = Products()
                    products.add(gram_acc, k_, transposed(k_))
                    plgpu.barrier_wait(q_ready)
                    plgpu.barrier_wait(scores_ready)
                    products.add(dk_acc, transposed(t_smem.at[at]), q_smem)
                    return lax.optimization_barrier(
                        (products.wait(dk_acc), products.take(gram_acc))
                    )

                dk, gram = pl.run_scoped(early, plgpu.ACC(wide, f32), plgpu.ACC(square, f32))
                plgpu.barrier_arrive(scores_read)
                d_a = jnp.where(column < row, -d_a * decays(vector, row, column), 0.0)
                sums_smem[D_BETA_TOO] = jnp.sum(d_a * gram, axis=1)
                d_gram = spread(beta, CHUNK) * d_a
                gates = d_gram * gram
                gates += jnp.where(
                    (row == last) & (column < last), across(load(row_smem, by_column), CHUNK), 0.0
                )
                gates = jnp.where(column == last, spread(from_state, CHUNK), gates)
                there = lax.rem(j * (slices + 1) + slices, STAGES)
                tiles = [new_smem.at[there, i] for i in range(2)]
                plgpu.barrier_wait(new_ready.at[there])
                for tile in tiles:
                    gates += tile[...].astype(f32)
                for tile, half in zip(tiles, rounded_halves(gates), strict=True):
                    tile[...] = half
                plgpu.commit_smem()
                spans = multiply(square, *((later, tile) for tile in tiles))
                spans = jnp.where((column < row) | (column == last), spans, 0.0)
                sums_smem[D_GATE] = jnp.sum(spans, axis=1)
                tile = tiles[0]
                tile[...] = d_gram.astype(bf16)
                plgpu.commit_smem()
                dk = multiply(dk, (tile, k_), (transposed(tile), k_))
                plgpu.barrier_arrive(new_free.at[there])
                plgpu.barrier_wait(k_read)
                k_[...] = dk.astype(bf16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k_, dk_ref.at[b, pl.ds(n * CHUNK, CHUNK), head])
                plgpu.copy_smem_to_gmem(
                    sums_smem.at[pl.ds(D_GATE, 2)], sums_ref.at[b, head, n, pl.ds(D_GATE, 2)]
                )

            plgpu.wait_smem_to_gmem(0)

        @pl.when(me == 2)
        def _copy():
            plgpu.set_max_registers(Tuning.registers[1], action="decrease")

            @pl.loop(0, mine)
            def _(j):
                b, head, n = place(j)
                tokens = pl.ds(n * CHUNK, CHUNK)
                at = lax.rem(j, STAGES)
                pl.when(j >= STAGES)(lambda: plgpu.barrier_wait(chunk_free.at[at]))
                whole = (
                    (k_ref.at[b, tokens, head], k_smem),
                    (t_ref.at[b, head, n, 0], t_smem),
                    (vectors_ref.at[b, head, n], vectors_smem),
                )
                for source, target in whole:
                    plgpu.copy_gmem_to_smem(source, target.at[at], chunk_ready.at[at])

                @pl.loop(0, slices)
                def _(s):
                    c = j * slices + s
                    here = lax.rem(c, STAGES)
                    pl.when(c >= STAGES)(lambda: plgpu.barrier_wait(slice_free.at[here]))
                    parts = [
                        (ref.at[b, tokens, head, columns(s)], x)
                        for ref, x in ((v_ref, v_smem), (do_ref, do_smem))
                    ]
                    parts += [
                        (ref.at[b, head, n, :, columns(s)], x)
                        for ref, x in ((x_ref, x_smem), (s_ref, s_smem))
                    ]
                    parts += [(ds_ref.at[b, head, n, columns(s)], ds_smem)]
                    for source, target in parts:
                        plgpu.copy_gmem_to_smem(source, target.at[here], slice_ready.at[here])

                # Needed after all slices, and there is one place, which the last chunk's dq leaves
                # while the first slice is worked on.
                pl.when(j > 0)(lambda: plgpu.barrier_wait(q_free))
                plgpu.copy_gmem_to_smem(q_ref.at[b, tokens, head], q_smem, q_ready)

    def entry(*refs):
        def shared(*shape):
            return plgpu.SMEM(
                shape,
                bf16,
                transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)),
            )

        smem = (
            shared(*wide),
            shared(STAGES, *wide),
            shared(STAGES, *square),
            plgpu.SMEM((STAGES, ROWS, CHUNK), f32),
            shared(STAGES, CHUNK, WIDTH),
            shared(STAGES, CHUNK, WIDTH),
            shared(STAGES, CHUNK, WIDTH),
            shared(STAGES, KEY, WIDTH),
            shared(STAGES, WIDTH, KEY),
            shared(*square),
            shared(STAGES, 2, *square),
            plgpu.SMEM((SUMS, CHUNK), f32),
            plgpu.SMEM((CHUNK,), f32),
        )
        barriers = (
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=5, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(),
            plgpu.Barrier(),
            plgpu.Barrier(),
        )
        pl.run_scoped(
            lambda *scratch: kernel(refs, scratch[:-1], scratch[-1]),
            *smem,
            barriers,
            collective_axes="group",
        )

    return plgpu.kernel(
        entry,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, bf16),
            jax.ShapeDtypeStruct(k.shape, bf16),
            jax.ShapeDtypeStruct(v.shape, bf16),
            jax.ShapeDtypeStruct((batch, heads, count, SUMS, CHUNK), f32),
        ],
        grid=(blocks,),
        grid_names=("work",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="gdn_gradients",
    )(q, k, v, d_out, inverse, states, x, d_states, vectors, jnp.zeros(1, jnp.int32))
