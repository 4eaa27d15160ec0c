"""Backward kernel of attention for Hopper GPUs, in Pallas Mosaic GPU.

Computes dq, dk and dv of out and lse from the saved log-sum-exp; the weights are recomputed. Key
row s is seen by the query rows first[s] to last[s] and by no other.

Tiling: a thread block owns 128 key rows of one key head, 64 for each of two computing warpgroups.
It loops over the blocks of 64 query rows that see them, for some of the query heads of that key
head. A third warpgroup starts the copies (TMA). Work starts with the first keys, which most queries
see. Scores are [keys, queries], so that weights and their gradients are register operands of the
sums dk and dv, which stay in registers. The gradients of the scores also go to shared memory. From
there each warpgroup computes half the columns of the block's dq, which the copy engine adds to a
float32 array in global memory, in no fixed order. There are five products, none computed twice.

Traffic: k, v, dk and dv once; q, d_out and 2 x dq (float32, into the L2 cache) once per 128 keys.
Floor: 10 D operations for each (query, head, visible key). With 16 heads, D 128 and a window of
8192: 0.70 ms at 8K and 4.9 at 32K.
"""

import math
from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.hopper.forward import tile_blocks
from pallas_kernels.attention.tuning import HopperBackward as Tuning
from pallas_kernels.mosaic_gpu import Products, across, full, load, spread, transposed

ROWS = 64  # query rows of a block, and key rows of a warpgroup
KEYS = 2 * ROWS
WIDTH = 128


@partial(jax.jit, static_argnames="scale")  # a model's layers share one compiled kernel
def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    shift: jax.Array,
    first: jax.Array,
    last: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq [B, T, Hq, 128] float32, dk and dv [B, T, Hkv, 128] float32.

    q, d_out: [B, T, Hq, 128]; k, v: [B, T, Hkv, 128], T a multiple of 128; none may hold a NaN, in
        pads either.
    lse, shift: [B, Hq, T] float32, finite: the log-sum-exp, and sum(out * d_out) - d_lse.
    first, last: [B, T] int32, the query rows that see each key row; first > last for none.
    """
    batch, length, q_heads, width = q.shape
    assert width == WIDTH and length % KEYS == 0
    group = q_heads // k.shape[2]
    heads = math.gcd(Tuning.heads, group)
    parts, stages = group // heads, Tuning.stages
    units = q_heads // heads
    blocks = tile_blocks(first, last, KEYS, ROWS, strict=True)
    log2_scale = scale * math.log2(math.e)
    dq = jax.new_ref(jnp.zeros(q.shape, jnp.float32))

    def kernel(refs, smem, barriers):
        (
            q_ref,
            k_ref,
            v_ref,
            do_ref,
            lse_ref,
            shift_ref,
            first_ref,
            last_ref,
            blocks_ref,
            dq_ref,
            dk_ref,
            dv_ref,
        ) = refs
        q_smem, do_smem, lse_smem, shift_smem, k_smem, v_smem, ds_smem, dq_smem = smem
        kv_ready, q_ready, do_ready, q_free, do_free, ds_ready = barriers
        me = lax.axis_index("group")
        work = lax.axis_index("work")
        unit = lax.rem(work, units)
        b = lax.rem(lax.div(work, units), batch)
        key = lax.div(work, units * batch) * KEYS
        key_head, part = lax.div(unit, parts), lax.rem(unit, parts)
        begin, whole, broken, end = (
            blocks_ref[b, lax.div(work, units * batch), i] for i in range(4)
        )
        count = end - begin

        def slot(i):
            return lax.rem(i, stages)

        @pl.when(me < 2)
        def _compute():
            plgpu.set_max_registers(Tuning.registers[0], action="increase")
            rows = pl.ds(key + me * ROWS, ROWS)
            by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
            low = load(first_ref.at[b, rows], by_row)
            high = load(last_ref.at[b, rows], by_row)
            plgpu.barrier_wait(kv_ready)

            def step(i, j, head, carry, masked):
                dk, dv = carry
                at = slot(i)

                def weigh(s_ref, dp_ref):
                    plgpu.barrier_wait(q_ready.at[at])
                    plgpu.barrier_wait(do_ready.at[at])
                    products = Products()
                    for c in range(WIDTH // 64):
                        products.add(
                            s_ref, k_smem.at[me, c], transposed(q_smem.at[at, :, pl.ds(64 * c, 64)])
                        )
                    products.add(dp_ref, v_smem.at[me], transposed(do_smem.at[at]))
                    lse = load(lse_smem.at[at], by_column, optimized=True)
                    s = products.wait(s_ref, running=1)
                    p = jnp.exp2(s * log2_scale - across(lse, ROWS))
                    if masked:
                        query = (
                            plgpu.broadcasted_iota(
                                jnp.int32, (ROWS, ROWS), 1, layout=plgpu.Layout.WGMMA
                            )
                            + j * ROWS
                        )
                        p = jnp.where(
                            (query >= spread(low, ROWS)) & (query <= spread(high, ROWS)), p, 0.0
                        )
                    p = lax.optimization_barrier(p)
                    return lax.optimization_barrier((p, products.wait(dp_ref)))

                scores = plgpu.ACC((ROWS, ROWS), jnp.float32)
                p, dp = pl.run_scoped(weigh, scores, scores)
                ds = p * (dp - across(load(shift_smem.at[at], by_column, optimized=True), ROWS))
                p, ds = p.astype(q.dtype), ds.astype(q.dtype)
                # Two alternating places, so that the warpgroups synchronise once a step.
                mine = lax.rem(i, 2)
                ds_smem[mine, me] = ds
                plgpu.commit_smem()
                plgpu.barrier_arrive(ds_ready)

                def add(dq_acc, dk_acc, dv_acc):
                    dk_acc[...], dv_acc[...] = dk, dv
                    products = Products()
                    products.add(dv_acc, p, do_smem.at[at])
                    plgpu.barrier_wait(ds_ready)
                    for half in range(2):
                        products.add(
                            dq_acc, transposed(ds_smem.at[mine, half]), k_smem.at[half, me]
                        )
                    products.add(dk_acc, ds, q_smem.at[at])
                    dq_block = products.wait(dq_acc, running=1)
                    plgpu.barrier_arrive(do_free.at[at])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    dq_smem[me] = dq_block
                    plgpu.commit_smem()
                    target = dq_ref.at[b, pl.ds(j * ROWS, ROWS), head, pl.ds(me * 64, 64)]
                    plgpu.copy_smem_to_gmem(dq_smem.at[me], target, reduction_op="add")
                    done = lax.optimization_barrier((products.wait(dk_acc), products.take(dv_acc)))
                    plgpu.barrier_arrive(q_free.at[at])
                    return done

                sums = (plgpu.ACC((ROWS, WIDTH), jnp.float32),) * 2
                return pl.run_scoped(add, plgpu.ACC((ROWS, 64), jnp.float32), *sums)

            def head(h, carry):
                head = key_head * group + part * heads + h

                def run(masked):
                    return lambda j, c: step(h * count + j - begin, j, head, c, masked)

                carry = lax.fori_loop(begin, whole, run(True), carry)
                carry = lax.fori_loop(whole, broken, run(False), carry)
                return lax.fori_loop(broken, end, run(True), carry)

            nothing = full((ROWS, WIDTH), 0, plgpu.Layout.WGMMA)
            dk, dv = lax.fori_loop(0, heads, head, (nothing, nothing))
            for x, ref in (dv, dv_ref), (dk * scale, dk_ref):
                v_smem[me] = x.astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(v_smem.at[me], ref.at[b, rows, unit])
                plgpu.wait_smem_to_gmem(0)

        @pl.when(me == 2)
        def _copy():
            plgpu.set_max_registers(Tuning.registers[1], action="decrease")
            for half in range(2):
                rows = pl.ds(key + half * ROWS, ROWS)
                for c in range(WIDTH // 64):
                    columns = pl.ds(64 * c, 64)
                    plgpu.copy_gmem_to_smem(
                        k_ref.at[b, rows, key_head, columns], k_smem.at[half, c], kv_ready
                    )
                plgpu.copy_gmem_to_smem(v_ref.at[b, rows, key_head], v_smem.at[half], kv_ready)

            @pl.loop(0, heads * count)
            def _(i):
                h = lax.div(i, count)
                head = key_head * group + part * heads + h
                rows = pl.ds((begin + i - h * count) * ROWS, ROWS)
                at = slot(i)
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(q_free.at[at]))
                plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], q_smem.at[at], q_ready.at[at])
                plgpu.copy_gmem_to_smem(lse_ref.at[b, head, rows], lse_smem.at[at], q_ready.at[at])
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(do_free.at[at]))
                plgpu.copy_gmem_to_smem(do_ref.at[b, rows, head], do_smem.at[at], do_ready.at[at])
                plgpu.copy_gmem_to_smem(
                    shift_ref.at[b, head, rows], shift_smem.at[at], do_ready.at[at]
                )

    def entry(*refs):
        def shared(*shape, dtype=q.dtype):
            tiling = plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
            return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(128)))

        plain = plgpu.SMEM((stages, ROWS), jnp.float32)
        smem = (
            shared(stages, ROWS, WIDTH),
            shared(stages, ROWS, WIDTH),
            plain,
            plain,
            shared(2, WIDTH // 64, ROWS, 64),
            shared(2, ROWS, WIDTH),
            shared(2, 2, ROWS, ROWS),
            shared(2, ROWS, 64, dtype=jnp.float32),
        )
        barriers = (
            plgpu.Barrier(num_arrivals=2 * (1 + WIDTH // 64)),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2),
        )
        pl.run_scoped(
            lambda *scratch: kernel(refs, *scratch), smem, barriers, collective_axes="group"
        )

    part_type = jax.ShapeDtypeStruct((batch, length, units, WIDTH), q.dtype)
    grid = length // KEYS * batch * units
    mesh = plgpu.Mesh(grid=(grid,), grid_names=("work",), num_threads=3, thread_name="group")
    parameters = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512)
    # Not plgpu.kernel, which takes no references: dq is a reference that the kernel adds to.
    run = pl.kernel(
        entry,
        [part_type, part_type],
        mesh=mesh,
        compiler_params=parameters,
        name="attention_backward",
    )
    dk, dv = run(q, k, v, d_out, lse * math.log2(math.e), shift, first, last, blocks, dq)
    dk, dv = (
        x.reshape(*k.shape[:3], parts, WIDTH).astype(jnp.float32).sum(axis=3) for x in (dk, dv)
    )
    return dq[...] * scale, dk, dv
