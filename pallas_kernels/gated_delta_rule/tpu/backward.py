"""The backward kernel of the gated delta rule for TPU, in Pallas: the backward chunk scan with the
state's gradient in vector memory, and all gradients of each chunk on the way.

For one head and one chunk, with S the state before it, R the gradient in the state after it, P = Q
K^T * D and the rest in the notation of xla.py:

    y    = V - d K S,  new = T (beta y): recomputed
    x    = T^T (P^T ct_out + D_C (K R)): gradient in beta y
    dA   = -x new^T below the diagonal,  X = beta dA * D,  dP = ct_out new^T
    dv   = beta x,  dbeta = x.y + sum_j dA_ij (K K^T * D)_ij
    dq   = d (ct_out S^T) + (dP * D) K
    dk   = -beta d (x S^T) + D_C (new R^T) + (X + X^T) K + (dP * D)^T Q
    E    = dP * P + X * (K K^T)
    dg_t = d_C S.R + sum_(j < t) D_C k.(new R^T) + sum_(i >= t > j) E_ij
           + sum_(i >= t) (d q.(ct_out S^T) - beta d k.(x S^T))
    R'   = d_C R + (d Q)^T ct_out - (beta d K)^T x: gradient in the state before

dg adds only its own terms, by a product with a triangle of ones. Differences of row and column sums
would lose it where it is far smaller than they are.

Tiling: a grid step takes two chunks of all heads of a block, the second chunk first. The grid is
batch x blocks of heads x pairs of chunks, the last dimension in order from the end. R stays in the
block of the initial state's gradient, float32. The state before every second chunk is an input; the
state in the middle of a pair is recomputed from it. Each product is issued for all heads of the
block before the next one, as in the forward scan.

Rounding: with bfloat16 inputs operands are bfloat16 and sums float32. Two places cancel much where
keys repeat: between T and its factor on the way to x, and in sums of E. These operands are two
bfloat16 each.

Traffic for a token of a head, in bfloat16: 2 (4 K + 3 V + 2 C) bytes, gates of 40, and 2 K V / 2 C
of states. At 8192 tokens, 16 heads, K 128, V 256: 446 MB. Floor: that, 0.54 ms on v5e and 0.27 on
v6e. Its products, 37 of 128 x 128 x 128 for a chunk, are 0.8 ms of v5e's four MXUs.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.tpu.chunk_scan import PAIR
from pallas_kernels.gated_delta_rule.tpu.gates import Gates
from pallas_kernels.gated_delta_rule.tpu.layout import tile
from pallas_kernels.gated_delta_rule.tpu.products import dot, f32, halves

VMEM = 32 * 2**20  # bytes


def backward(
    q, k, v, parts, rows, states, ct_out, ct_last, heads: int, interpret
) -> tuple[jax.Array, ...]:
    """dq, dk [batch, chunks * C, heads * K] and dv [..., heads * V] in the operands' dtype; in
    float32 dg and dbeta [chunks, batch, heads, 2, C] and the gradient in the initial state [batch,
    heads, K, V].

    q, k: [batch, chunks * C, heads * K]. v, ct_out: [..., heads * V].
    parts: one or two of [chunks, batch, heads, C, C] that add up to T. These five have one dtype.
    rows: from `gate_rows`.
    states: [ceil(chunks / 2), batch, heads, K, V], the state before every second chunk.
    ct_last: [batch, heads, K, V] float32.
    heads: heads of a block.
    """
    chunks, batch, all_heads, _, size = rows.shape
    _, _, key, value = ct_last.shape
    pairs, dtype, exact, block = pl.cdiv(chunks, PAIR), k.dtype, k.dtype == f32, range(heads)
    split = (lambda x: (x,)) if exact else halves

    def transposed_product(a: tuple, b: tuple):
        """a^T b of two matrices given by their parts. The product of both second parts would add
        nothing."""
        return sum(dot(x, y, (0, 0)) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2)

    def over(x):
        """[C, 1]: the sum of each row."""
        return jnp.sum(x, axis=1, keepdims=True)

    def keys(n, h):
        return tile(n, h, size, key)

    def values(n, h):
        return tile(n, h, size, value)

    def kernel(q_ref, k_ref, v_ref, *refs):
        t_refs, refs = refs[: len(parts)], refs[len(parts) :]
        rows_ref, states_ref, ct_out_ref, ct_last_ref, dq_ref, dk_ref, dv_ref, gates_ref, ct_ref = (
            refs
        )

        @pl.when(pl.program_id(2) == 0)
        def _():
            mine = pl.ds(pl.program_id(0), 1), pl.ds(pl.program_id(1) * heads, heads)
            pltpu.sync_copy(ct_last_ref.at[mine], ct_ref)

        row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
        lower = (row >= column).astype(dtype)

        def again(n, states):
            """Recomputes a chunk's forward pass: gates, y and new."""
            gates = [Gates(rows_ref[n, h], exact) for h in block]
            read = [dot(k_ref[keys(n, h)], states[h]) for h in block]
            wrong = [v_ref[values(n, h)].astype(f32) - gates[h].since * read[h] for h in block]
            new = [dot(t_refs[0][n, h], (gates[h].beta * wrong[h]).astype(dtype)) for h in block]
            return gates, wrong, new

        def back(n, states, gates, wrong, new):
            between = [gates[h].between() for h in block]
            after = [ct_ref[0, h].astype(dtype) for h in block]
            scores = [dot(q_ref[keys(n, h)], k_ref[keys(n, h)], (1, 1)) * between[h] for h in block]
            grams = [dot(k_ref[keys(n, h)], k_ref[keys(n, h)], (1, 1)) * between[h] for h in block]
            new = [x.astype(dtype) for x in new]
            outer = [dot(scores[h].astype(dtype), ct_out_ref[values(n, h)], (0, 0)) for h in block]
            inner = [dot(k_ref[keys(n, h)], after[h]) for h in block]
            ct_new = [outer[h] + gates[h].until * inner[h] for h in block]
            x = [transposed_product([t[n, h] for t in t_refs], split(ct_new[h])) for h in block]
            narrow_x = [y.astype(dtype) for y in x]

            ct_scores = [dot(ct_out_ref[values(n, h)], new[h], (1, 1)) for h in block]
            ct_a = [jnp.where(row > column, -dot(narrow_x[h], new[h], (1, 1)), 0.0) for h in block]
            ct_grams = [gates[h].beta * ct_a[h] for h in block]
            e = [ct_scores[h] * scores[h] + ct_grams[h] * grams[h] for h in block]
            # [j, t]
            spanned = [sum(dot(part, lower, (0, 0)) for part in split(e[h])) for h in block]

            ct_scores = [(ct_scores[h] * between[h]).astype(dtype) for h in block]
            ct_grams = [(ct_grams[h] * between[h]).astype(dtype) for h in block]
            from_out = [
                gates[h].since * dot(ct_out_ref[values(n, h)], states[h], (1, 1)) for h in block
            ]
            from_x = [
                gates[h].beta * gates[h].since * dot(narrow_x[h], states[h], (1, 1)) for h in block
            ]
            from_new = [gates[h].until * dot(new[h], after[h], (1, 1)) for h in block]
            through_q = [dot(ct_scores[h], k_ref[keys(n, h)]) for h in block]
            through_k = [
                dot(ct_grams[h], k_ref[keys(n, h)]) + dot(ct_grams[h], k_ref[keys(n, h)], (0, 0))
                for h in block
            ]
            through_k = [through_k[h] + dot(ct_scores[h], q_ref[keys(n, h)], (0, 0)) for h in block]
            queries = [
                (q_ref[keys(n, h)].astype(f32) * gates[h].since).astype(dtype) for h in block
            ]
            weighted = [
                (k_ref[keys(n, h)].astype(f32) * (gates[h].beta * gates[h].since)).astype(dtype)
                for h in block
            ]
            added = [dot(queries[h], ct_out_ref[values(n, h)], (0, 0)) for h in block]
            taken = [dot(weighted[h], narrow_x[h], (0, 0)) for h in block]
            for h in block:
                dq_ref[keys(n, h)] = (from_out[h] + through_q[h]).astype(dtype)
                dk_ref[keys(n, h)] = (from_new[h] - from_x[h] + through_k[h]).astype(dtype)
                dv_ref[values(n, h)] = (gates[h].beta * x[h]).astype(dtype)
                q, k = q_ref[keys(n, h)].astype(f32), k_ref[keys(n, h)].astype(f32)
                # [C, 1]
                until_end, since_start = (
                    over(k * from_new[h]),
                    over(q * from_out[h] - k * from_x[h]),
                )
                state = jnp.sum(states[h].astype(f32) * ct_ref[0, h]) * gates[h].whole
                through = jnp.where(row < column, spanned[h] + until_end, 0.0)
                through += jnp.where(row >= column, since_start, 0.0)
                ct_beta = over(x[h] * wrong[h]) + over(ct_a[h] * grams[h])
                gates_ref[n, h, 0:1] = jnp.sum(through, axis=0, keepdims=True) + state
                gates_ref[n, h, 1:2] = jnp.sum(
                    jnp.where(row == column, ct_beta, 0.0), axis=0, keepdims=True
                )
                ct_ref[0, h] = gates[h].whole * ct_ref[0, h] + added[h] - taken[h]

        first = [states_ref[0, h] for h in block]
        known = again(0, first)

        def second():
            gates, _, new = known
            kept = [gates[h].until * new[h] for h in block]
            added = [
                sum(dot(k_ref[keys(0, h)], part, (0, 0)) for part in split(kept[h])) for h in block
            ]
            middle = [
                (gates[h].whole * first[h].astype(f32) + added[h]).astype(dtype) for h in block
            ]
            back(1, middle, *again(1, middle))

        if chunks % PAIR == 0:
            second()
        else:  # an odd number of chunks leaves the last pair without its second
            pl.when(pl.program_id(2) > 0)(second)
        back(0, first, *known)

    def tokens(width):
        return pl.BlockSpec(
            (None, PAIR * size, heads * width), lambda b, h, n: (b, pairs - 1 - n, h)
        )

    def spec(x, length):
        return pl.BlockSpec(
            (length, None, heads, *x.shape[3:]), lambda b, h, n: (pairs - 1 - n, b, h, 0, 0)
        )

    gates = jax.ShapeDtypeStruct((chunks, batch, all_heads, 2, size), f32)
    outs = [*(jax.ShapeDtypeStruct(x.shape, dtype) for x in (q, k, v)), gates]
    return pl.pallas_call(
        kernel,
        grid=(batch, all_heads // heads, pairs),
        in_specs=[
            *(tokens(width) for width in (key, key, value)),
            *(spec(x, PAIR) for x in (*parts, rows)),
            spec(states, 1),
            tokens(value),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[
            *(tokens(width) for width in (key, key, value)),
            spec(gates, PAIR),
            pl.BlockSpec((1, heads, key, value), lambda b, h, n: (b, h, 0, 0)),
        ],
        out_shape=[*outs, jax.ShapeDtypeStruct(ct_last.shape, f32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="gdn_backward",
    )(q, k, v, *parts, rows, states, ct_out, ct_last)
