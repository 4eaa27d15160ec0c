"""The kernel that computes T = (I + A)^-1 of every chunk, with A the strictly lower part of (beta_i
k_i.k_j D_ij), in Pallas for TPU.

The diagonal blocks of A, 16 x 16, are inverted by substitution, all blocks of a chunk side by side
in one [16, C] array. Blocks are then doubled until one is left: X <- X - X S X, with S the part of
A that joins two halves. Only the lower halves change, so products have C / 2 rows. No power of A is
formed: powers can overflow where the inverse is small.

With float32 keys all products are in full float32. With bfloat16 keys k k^T is exact in one pass.
The doublings take three passes, with operands in two halves. The halves of T are the output: the
scan reads the first, the backward pass adds them up.

Tiling: a grid step takes one chunk of all heads of a block, 8 at K 128 and V 256. Each step of the
computation is done for all of them before the next one, because it waits for the one before. Chunks
are independent.

Traffic for a token of a head, in bfloat16: 2 (K + 2 C) bytes, gates of 32. At 8192 tokens, 16 heads
and K 128: 105 MB. Floor: that, 0.13 ms on v5e and 0.06 on v6e. It takes three to four times as
long, bound by products that fill little of an MXU and by the lanes' crossbar.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.tpu.gates import Gates
from pallas_kernels.gated_delta_rule.tpu.layout import tile
from pallas_kernels.gated_delta_rule.tpu.products import bf16, dot, dot_halves, halves
from pallas_kernels.gated_delta_rule.tuning import TPU as TPUDelta

BASE = TPUDelta.base


def inverse(
    k: jax.Array, rows: jax.Array, heads: int, full: bool, interpret
) -> tuple[jax.Array, ...]:
    """T [chunks, batch, heads, C, C] from k [batch, chunks * C, heads * K] and `gate_rows`.

    With float32 k: (T,). With bfloat16 k: T rounded to bfloat16 and, if `full`, the remainder in
    bfloat16.
    """
    chunks, batch, all_heads, _, size = rows.shape
    width = k.shape[2] // all_heads
    narrow, block = k.dtype == bf16, range(heads)
    count = 2 if narrow and full else 1

    def kernel(k_ref, rows_ref, *out_refs):
        gates = [Gates(rows_ref[h], not narrow) for h in block]
        keys = [k_ref[tile(0, h, size, width)] for h in block]
        grams = [dot(k, k, (1, 1)) for k in keys]
        inverses = unit_lower_inverses(
            [gates[h].beta * grams[h] * gates[h].between() for h in block], narrow
        )
        for h in block:
            for ref, part in zip(out_refs, inverses[h][:count], strict=True):
                ref[h] = part

    def spec(x):
        return pl.BlockSpec((None, None, heads, *x.shape[3:]), lambda b, h, n: (n, b, h, 0, 0))

    out = jax.ShapeDtypeStruct((chunks, batch, all_heads, size, size), k.dtype)
    return pl.pallas_call(
        kernel,
        grid=(batch, all_heads // heads, chunks),
        in_specs=[pl.BlockSpec((None, size, heads * width), lambda b, h, n: (b, n, h)), spec(rows)],
        out_specs=[spec(out)] * count,
        out_shape=[out] * count,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel")
        ),
        interpret=interpret,
        name="gdn_inverse",
    )(k, rows)


def unit_lower_inverses(matrices, narrow: bool) -> list[tuple]:
    """(I + strictly lower part of a)^-1 for each a [C, C] float32, C a multiple of BASE: as
    halves if `narrow`, else (inverse,)."""
    size = matrices[0].shape[0]
    split, multiply = (
        (halves, dot_halves) if narrow else (lambda x: (x,), lambda a, b: dot(a[0], b[0]))
    )
    count = size // BASE
    row, lane = (lax.broadcasted_iota(jnp.int32, (BASE, size), axis) for axis in (0, 1))
    # [matrix][slab] of BASE rows
    slabs = [[x[BASE * s : BASE * (s + 1)] for s in range(count)] for x in matrices]

    # The diagonal blocks side by side, [BASE, C], inverted by substitution.
    blocks = [
        sum(jnp.where(lane // BASE == s, slab, 0.0) for s, slab in enumerate(x)) for x in slabs
    ]
    blocks = [jnp.where(row > lane % BASE, x, 0.0) for x in blocks]
    inverses = [jnp.where(row == lane % BASE, 1.0, 0.0)] * len(matrices)
    for m in range(BASE - 1):
        spread = [jnp.take_along_axis(x, lane // BASE * BASE + m, axis=1) for x in blocks]
        inverses = [x - y * x[m : m + 1] for x, y in zip(inverses, spread, strict=True)]
    inverses = [[jnp.where(lane // BASE == s, x, 0.0) for s in range(count)] for x in inverses]
    parts = [[split(slab) for slab in x] for x in inverses]

    half = BASE
    while half < size:
        lower = [s for s in range(count) if s * BASE // half % 2]
        joint = {s: lane // half == s * BASE // half - 1 for s in lower}
        joints = [[split(jnp.where(joint[s], x[s], 0.0)) for s in lower] for x in slabs]
        right = [multiply(_stack(x), _stack(y)) for x, y in zip(joints, parts, strict=True)]
        right = [_spread(split(x), lower, count) for x in right]
        joints = [
            multiply(_stack([x[s] for s in lower]), y) for x, y in zip(parts, right, strict=True)
        ]
        for x, known, z in zip(inverses, parts, joints, strict=True):
            for place, s in enumerate(lower):
                x[s] = jnp.where(joint[s], -z[BASE * place : BASE * (place + 1)], x[s])
                known[s] = split(x[s])
        half *= 2
    return [_stack(x) for x in parts]


def _stack(slabs) -> tuple:
    return tuple(jnp.concatenate(x) for x in zip(*slabs, strict=True))


def _spread(parts, lower, count) -> tuple:
    """Slabs of `parts` at the places `lower` of `count`, zeros elsewhere."""

    def spread(x):
        zeros = jnp.zeros((BASE, x.shape[1]), x.dtype)
        return jnp.concatenate(
            [x[BASE * lower.index(s) :][:BASE] if s in lower else zeros for s in range(count)]
        )

    return tuple(map(spread, parts))
