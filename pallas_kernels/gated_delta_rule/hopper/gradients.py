"""The gradients of all chunks in parallel: the second of two backward kernels for Hopper GPUs, in
Pallas Mosaic GPU.

In the notation of xla.py, S is the state before the chunk. chunk_scan_backward.py gives dS', the
gradient of the state after the chunk, and x, the gradient of beta (V - d K S). What is left are
sums over tokens of the chunk and over the state:

    new   = T beta (V - d K S)
    dP    = d_out new^T
    dA    = -x new^T below the diagonal
    X     = beta dA * D
    dv    = beta x
    dbeta = x.(V - d K S) + sum_j dA_ij k_i.k_j D_ij
    dq    = d (d_out S^T) + (dP * D) K
    dk    = -beta d (x S^T) + D_C (new dS'^T) + (X + X^T) K + (dP * D)^T Q
    dg_t  = d_C S.dS' + sum of E_ij over i >= t > j + sum of F_i over i >= t
    E     = dP * D * (Q K^T) + X * (K K^T), with D_C k.(new dS'^T) added to its last row
    F_i   = d q.(d_out S^T) - beta d k.(x S^T)

dg adds only its own terms. It is often far smaller than E, so the difference of row and column sums
would lose it. F is stored in the last column of E, which is empty. One product with a triangle of
ones then forms all sums.

Tiling: a thread block takes chunk after chunk, the state 64 columns at a time. One warpgroup
computes `new` and what belongs to queries (gradients_queries.py). Another computes what belongs to
keys (gradients_keys.py). A third starts the copies (gradients_copies.py).

Rounding: operands are bfloat16, sums float32. E, `new` in dP and dA, and dP * D in dq are two
bfloat16 each. Where keys resemble each other these sums cancel, but rounding errors do not: dq is
2.4 % off with one bfloat16 and T cut off instead of rounded, 0.5 % with two. dP and dA take the
same `new`, because dg is a difference of theirs.

Results go through shared memory and the copy engine. Nobody waits for a copy before its place is
needed again. After a plain store to global memory, the fence before the next product's operands
would last as long as the store (thousands of clocks).

Traffic: for a chunk of a head 264 KiB read and 66 KiB written with V 256. Floor at 16 heads, 8,192
tokens and 3 TB/s: 0.22 ms of traffic; the 77 products of 64 x 64 x 64 are 0.08 ms of tensor core.
Measured on an H100: 0.39 ms. Most of the rest is waiting for slices, of which only two fit.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.chunk_scan_backward import CHUNK
from pallas_kernels.gated_delta_rule.hopper.gradients_copies import copies
from pallas_kernels.gated_delta_rule.hopper.gradients_keys import keys
from pallas_kernels.gated_delta_rule.hopper.gradients_memory import (
    SUMS,
    Refs,
    barriers,
    memory,
    work_of,
)
from pallas_kernels.gated_delta_rule.hopper.gradients_queries import queries
from pallas_kernels.gated_delta_rule.hopper.spans import KEY, WIDTH
from pallas_kernels.gated_delta_rule.tuning import HopperGradients as Tuning
from pallas_kernels.hardware import HOPPER_MULTIPROCESSORS

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
    two parts of dbeta, dg without d_C S.dS', and 64 parts of S.dS'.

    q, k, v, d_out, inverse, vectors: as in `chunk_scan_backward`.
    x, d_states: from there.
    states: [B, H, N, 128, V] bfloat16, the state before each chunk.
    """
    batch, length, heads, width = v.shape
    slices, odd = divmod(width, WIDTH)
    assert k.shape[3] == KEY and length % CHUNK == 0 and not odd
    count = length // CHUNK
    items = batch * heads * count
    blocks = min(items, HOPPER_MULTIPROCESSORS)

    def kernel(refs, smem, barriers):
        me = lax.axis_index("group")
        work = work_of(items, blocks, heads, count, slices)

        @pl.when(me == 0)
        def _():
            plgpu.set_max_registers(Tuning.registers[0], action="increase")
            queries(work, refs, smem, barriers)

        @pl.when(me == 1)
        def _():
            plgpu.set_max_registers(Tuning.registers[0], action="increase")
            keys(work, refs, smem, barriers)

        @pl.when(me == 2)
        def _():
            plgpu.set_max_registers(Tuning.registers[1], action="decrease")
            copies(work, refs, smem, barriers)

    def entry(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(Refs(*refs), *scratch),
            memory(),
            barriers(),
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
