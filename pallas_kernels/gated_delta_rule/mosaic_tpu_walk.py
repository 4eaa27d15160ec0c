"""The walk over the chunks, in Pallas for TPU."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.mosaic_tpu_gates import Gates
from pallas_kernels.gated_delta_rule.mosaic_tpu_products import dot, f32


def walk(q, k, v, inverse, rows, initial, heads: int, save: bool, interpret) -> tuple[jax.Array, ...]:
    """out [chunks, batch, heads, C, V], last [batch, heads, K, V] float32 and, if `save`, the state before each chunk
    [chunks, batch, heads, K, V] in the operands' dtype.

    q, k [chunks, batch, heads, C, K], v [..., V], inverse [..., C], all of one dtype; rows from `gate_rows`; initial
    [batch, heads, K, V] float32.
    """
    chunks, batch, all_heads, size, _ = k.shape
    dtype = k.dtype

    def kernel(q_ref, k_ref, v_ref, inverse_ref, rows_ref, initial_ref, out_ref, last_ref, *rest):
        state_ref = rest[-1]

        @pl.when(pl.program_id(2) == 0)
        def _():
            state_ref[...] = initial_ref[...]

        for h in range(heads):
            gates = Gates(rows_ref[h])
            query, key, state = q_ref[h], k_ref[h], state_ref[h]
            before = state.astype(dtype)
            if save:
                rest[0][h] = before
            read = dot(jnp.concatenate([key, query]), before)  # [2 C, V]
            wrong = gates.beta * (v_ref[h].astype(f32) - gates.since * read[:size])
            new = dot(inverse_ref[h], wrong.astype(dtype)).astype(dtype)
            scores = (dot(query, key, (1, 1)) * gates.between()).astype(dtype)
            out_ref[h] = (gates.since * read[size:] + dot(scores, new)).astype(dtype)
            keys = (key.astype(f32) * gates.until).astype(dtype)
            state_ref[h] = gates.whole * state + dot(keys, new, (0, 0))

        @pl.when(pl.program_id(2) == chunks - 1)
        def _():
            last_ref[...] = state_ref[...]

    def spec(x):
        return pl.BlockSpec((None, None, heads, *x.shape[3:]), lambda b, h, n: (n, b, h, 0, 0))

    whole = pl.BlockSpec((None, heads, *initial.shape[2:]), lambda b, h, n: (b, h, 0, 0))
    out = jax.ShapeDtypeStruct(v.shape, dtype)
    last = jax.ShapeDtypeStruct(initial.shape, f32)
    states = [jax.ShapeDtypeStruct((chunks, *initial.shape), dtype)] * save
    return pl.pallas_call(
        kernel,
        grid=(batch, all_heads // heads, chunks),
        in_specs=[*map(spec, (q, k, v, inverse, rows)), whole],
        out_specs=[spec(out), whole, *map(spec, states)],
        out_shape=[out, last, *states],
        scratch_shapes=[pltpu.VMEM((heads, *initial.shape[2:]), f32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="gdn_walk",
    )(q, k, v, inverse, rows, initial)
