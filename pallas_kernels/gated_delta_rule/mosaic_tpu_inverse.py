"""T = (I + A)^-1 for every chunk, A the strictly lower part of (beta_i k_i.k_j D_ij), in Pallas for TPU."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.mosaic_tpu_gates import Gates
from pallas_kernels.gated_delta_rule.mosaic_tpu_products import bf16, dot, dot_halves, halves


def inverse(k: jax.Array, rows: jax.Array, heads: int, full: bool, interpret) -> tuple[jax.Array, ...]:
    """T [chunks, batch, heads, C, C] of k [chunks, batch, heads, C, K] and `gate_rows`. With float32 k: (T,). With bfloat16 k: T
    rounded to bfloat16 and, if `full`, what the rounding left, in bfloat16."""
    chunks, batch, all_heads, size, _ = k.shape
    narrow = k.dtype == bf16
    count = 2 if narrow and full else 1

    def kernel(k_ref, rows_ref, *out_refs):
        for h in range(heads):
            key = k_ref[h]
            gates = Gates(rows_ref[h])
            a = gates.beta * dot(key, key, (1, 1)) * gates.between()
            t = unit_lower_inverse(a, narrow)
            for ref, part in zip(out_refs, halves(t)[:count] if narrow else (t,), strict=True):
                ref[h] = part

    def spec(x):
        return pl.BlockSpec((None, None, heads, *x.shape[3:]), lambda b, h, n: (n, b, h, 0, 0))

    out = jax.ShapeDtypeStruct((chunks, batch, all_heads, size, size), k.dtype)
    return pl.pallas_call(
        kernel,
        grid=(batch, all_heads // heads, chunks),
        in_specs=[spec(k), spec(rows)],
        out_specs=[spec(out)] * count,
        out_shape=[out] * count,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        interpret=interpret,
        name="gdn_inverse",
    )(k, rows)


def unit_lower_inverse(a, narrow: bool):
    """(I + strictly lower part of a)^-1 for a [C, C] float32, C a power of two; three bfloat16 passes a product if `narrow`."""
    size = a.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, a.shape, axis) for axis in (0, 1))

    def joins(level):
        return (row >> (level + 1) == column >> (level + 1)) & (row >> level > column >> level)

    x = jnp.where(row == column, 1.0, 0.0) - jnp.where(joins(0), a, 0.0)
    for level in range(1, size.bit_length() - 1):
        s = jnp.where(joins(level), a, 0.0)
        if narrow:
            parts = halves(x)
            x = x - dot_halves(parts, halves(dot_halves(halves(s), parts)))
        else:
            x = x - dot(x, dot(s, x))
    return x
