"""The backward kernel of the gated delta rule for TPU: the walk back over the chunks with the state's gradient in vector memory, in
Pallas.

For one head and one chunk, with R the gradient in the state after it and P = Q K^T * D (all else as in `xla`'s docstring):

    ct_new = P^T ct_out + D_C (K R)
    R'     = d_C R + (d Q)^T ct_out - w^T ct_new   gradient in the state before

It writes R for every chunk. Given the states before the chunks and R after them, gradients in the inputs are products inside chunks,
which are left to XLA (`xla._backward`): it also makes w, which is read here.

Tiling: a grid step takes one chunk of all heads of a block, 8 where K = 128 and V = 256; the grid is batch x blocks of heads x chunks,
the last in order from the end. R stays in the block of the initial state's gradient, float32. Each product is issued for all heads of
the block before the next one, as in the walk forward.

Traffic for a token of a head, in bfloat16: 2 (3 K + V) bytes, gates of 32, and 2 K V / C for R. At 8192 tokens, 16 heads, K 128,
V 256: 243 MB, or 0.30 ms on v5e and 0.15 on v6e; products take 4.5 C K V multiplications a chunk, 0.15 ms on v5e at its peak.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu

from pallas_kernels.gated_delta_rule.mosaic_tpu_gates import Gates
from pallas_kernels.gated_delta_rule.mosaic_tpu_products import dot, f32

VMEM = 32 * 2**20  # bytes


def walk_back(q, k, w, ct_out, rows, ct_last, heads: int, interpret) -> tuple[jax.Array, jax.Array]:
    """Gradient in the state after each chunk [chunks, batch, heads, K, V] in the operands' dtype and in the initial one float32.

    q, k, w [chunks, batch, heads, C, K] and ct_out [..., V], all of one dtype; rows from `gate_rows`; ct_last
    [batch, heads, K, V] float32; `heads` of a block.
    """
    chunks, batch, all_heads, _, _ = k.shape
    dtype, exact, block = k.dtype, k.dtype == f32, range(heads)

    def kernel(q_ref, k_ref, w_ref, ct_out_ref, rows_ref, ct_last_ref, cts_ref, ct_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            mine = pl.ds(pl.program_id(0), 1), pl.ds(pl.program_id(1) * heads, heads)
            pltpu.sync_copy(ct_last_ref.at[mine], ct_ref)

        gates = [Gates(rows_ref[h], exact) for h in block]
        after = [ct_ref[0, h].astype(dtype) for h in block]
        for h in block:
            cts_ref[h] = after[h]
        grams = [dot(k_ref[h], q_ref[h], (1, 1)) for h in block]
        inner = [dot(k_ref[h], after[h]) for h in block]
        scores = [(grams[h] * gates[h].between(transposed=True)).astype(dtype) for h in block]
        outer = [dot(scores[h], ct_out_ref[h]) for h in block]
        queries = [(q_ref[h].astype(f32) * gates[h].since).astype(dtype) for h in block]
        added = [dot(queries[h], ct_out_ref[h], (0, 0)) for h in block]
        ct_new = [(outer[h] + gates[h].until * inner[h]).astype(dtype) for h in block]
        taken = [dot(w_ref[h], ct_new[h], (0, 0)) for h in block]
        for h in block:
            ct_ref[0, h] = gates[h].whole * ct_ref[0, h] + added[h] - taken[h]

    def spec(x):
        return pl.BlockSpec((None, None, heads, *x.shape[3:]), lambda b, h, n: (chunks - 1 - n, b, h, 0, 0))

    cts = jax.ShapeDtypeStruct((chunks, *ct_last.shape), dtype)
    return pl.pallas_call(
        kernel,
        grid=(batch, all_heads // heads, chunks),
        in_specs=[*map(spec, (q, k, w, ct_out, rows)), pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=[spec(cts), pl.BlockSpec((1, heads, *ct_last.shape[2:]), lambda b, h, n: (b, h, 0, 0))],
        out_shape=[cts, jax.ShapeDtypeStruct(ct_last.shape, f32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM),
        interpret=interpret,
        name="gdn_walk_back",
    )(q, k, w, ct_out, rows, ct_last)
