"""The walk back over the chunks, in Pallas for TPU."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu

from pallas_kernels.gated_delta_rule.mosaic_tpu_gates import Gates
from pallas_kernels.gated_delta_rule.mosaic_tpu_products import dot, f32


def walk_back(q, k, w, ct_out, rows, ct_last, heads: int, interpret) -> tuple[jax.Array, jax.Array]:
    """Gradient in the state after each chunk [chunks, batch, heads, K, V] in the operands' dtype and in the initial one float32.

    q, k, w [chunks, batch, heads, C, K] and ct_out [..., V], all of one dtype; rows from `gate_rows`; ct_last
    [batch, heads, K, V] float32.
    """
    chunks, batch, all_heads, size, _ = k.shape
    dtype = k.dtype

    def kernel(q_ref, k_ref, w_ref, ct_out_ref, rows_ref, ct_last_ref, cts_ref, first_ref, ct_ref):
        @pl.when(pl.program_id(2) == 0)
        def _():
            ct_ref[...] = ct_last_ref[...]

        for h in range(heads):
            gates = Gates(rows_ref[h])
            query, key, ct_out, ct = q_ref[h], k_ref[h], ct_out_ref[h], ct_ref[h]
            after = ct.astype(dtype)
            cts_ref[h] = after
            scores = (dot(key, query, (1, 1)) * gates.between(transposed=True)).astype(dtype)
            ct_new = dot(scores, ct_out) + gates.until * dot(key, after)
            queries = (query.astype(f32) * gates.since).astype(dtype)
            ct_ref[h] = gates.whole * ct + dot(queries, ct_out, (0, 0)) - dot(w_ref[h], ct_new.astype(dtype), (0, 0))

        @pl.when(pl.program_id(2) == chunks - 1)
        def _():
            first_ref[...] = ct_ref[...]

    def spec(x):
        return pl.BlockSpec((None, None, heads, *x.shape[3:]), lambda b, h, n: (chunks - 1 - n, b, h, 0, 0))

    whole = pl.BlockSpec((None, heads, *ct_last.shape[2:]), lambda b, h, n: (b, h, 0, 0))
    cts = jax.ShapeDtypeStruct((chunks, *ct_last.shape), dtype)
    return pl.pallas_call(
        kernel,
        grid=(batch, all_heads // heads, chunks),
        in_specs=[*map(spec, (q, k, w, ct_out, rows)), whole],
        out_specs=[spec(cts), whole],
        out_shape=[cts, jax.ShapeDtypeStruct(ct_last.shape, f32)],
        scratch_shapes=[pltpu.VMEM((heads, *ct_last.shape[2:]), f32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="gdn_walk_back",
    )(q, k, w, ct_out, rows, ct_last)
