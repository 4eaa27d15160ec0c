"""The forward kernel of the gated delta rule for TPU, in Pallas: the chunk scan with the state in
vector memory.

For one head and one chunk, with S the state before it, T from inverse.py and the decays in the
notation of xla.py:

    new = T (beta (V - d K S)): what each token adds to the state
    out = d (Q S) + (Q K^T * D) new
    S'  = d_C S + K^T (D_C new)

D_C new is two bfloat16: with a repeated key its errors add up. The kernel computes everything else
from q, k, v and T. That is less to read than u, w and the weighted scores, and no program has to
write them.

Tiling: a grid step takes two chunks in sequence, of all heads of a block (8 at K 128 and V 256).
The grid is batch x blocks of heads x pairs of chunks, the last dimension in order. S stays in the
block of the final state, float32, from the first pair to the last. Each product is issued for all
heads of the block before the next one: products of one head wait for each other, and a [C, V]
result keeps only two MXU tiles busy. Only the state before each pair is saved; the backward pass
recomputes the one in its middle. That halves the saved states, and the scan is bound by traffic.

Traffic for a token of a head, in bfloat16: 2 (2 K + 2 V + C) bytes, gates of 32, and 2 K V / 2 C
where states are saved. At 8192 tokens, 16 heads, K 128, V 256: 277 MB, 0.34 ms on v5e and 0.17 on
v6e. Products take 6.5 C K V multiplications a chunk, 0.21 ms on v5e at its peak.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.tpu.gates import Gates
from pallas_kernels.gated_delta_rule.tpu.layout import tile
from pallas_kernels.gated_delta_rule.tpu.products import dot, f32, halves

PAIR = 2  # chunks of a step, and of a saved state
VMEM = 32 * 2**20  # bytes


def chunk_scan(
    q, k, v, inverse, rows, initial, heads: int, save: bool, interpret
) -> tuple[jax.Array, ...]:
    """out [batch, chunks * C, heads * V], last [batch, heads, K, V] float32 and, if `save`, the
    state before every second chunk [ceil(chunks / 2), batch, heads, K, V] in the operands' dtype.

    q, k: [batch, chunks * C, heads * K]. v: [..., heads * V].
    inverse: [chunks, batch, heads, C, C]. These four have one dtype.
    rows: from `gate_rows`.
    initial: [batch, heads, K, V] float32.
    heads: heads of a block.
    """
    chunks, batch, all_heads, size, _ = inverse.shape
    _, _, key, value = initial.shape
    pairs, dtype, exact, block = pl.cdiv(chunks, PAIR), k.dtype, k.dtype == f32, range(heads)

    def kernel(
        q_ref, k_ref, v_ref, inverse_ref, rows_ref, initial_ref, out_ref, state_ref, *saved_ref
    ):
        @pl.when(pl.program_id(2) == 0)
        def _():
            mine = pl.ds(pl.program_id(0), 1), pl.ds(pl.program_id(1) * heads, heads)
            pltpu.sync_copy(initial_ref.at[mine], state_ref)

        for ref in saved_ref:
            ref[0] = state_ref[0].astype(dtype)

        def chunk(n):
            keys, values = ([tile(n, h, size, width) for h in block] for width in (key, value))
            gates = [Gates(rows_ref[n, h], exact) for h in block]
            states = [state_ref[0, h].astype(dtype) for h in block]
            # [2 C, V]
            read = [
                dot(jnp.concatenate([k_ref[keys[h]], q_ref[keys[h]]]), states[h]) for h in block
            ]
            grams = [dot(q_ref[keys[h]], k_ref[keys[h]], (1, 1)) for h in block]
            wrong = [
                gates[h].beta * (v_ref[values[h]].astype(f32) - gates[h].since * read[h][:size])
                for h in block
            ]
            new = [dot(inverse_ref[n, h], wrong[h].astype(dtype)) for h in block]
            scores = [(grams[h] * gates[h].between()).astype(dtype) for h in block]
            inner = [dot(scores[h], new[h].astype(dtype)) for h in block]
            kept = [gates[h].until * new[h] for h in block]
            added = [
                sum(
                    dot(k_ref[keys[h]], part, (0, 0))
                    for part in ([kept[h]] if exact else halves(kept[h]))
                )
                for h in block
            ]
            for h in block:
                out_ref[values[h]] = (gates[h].since * read[h][size:] + inner[h]).astype(dtype)
                state_ref[0, h] = gates[h].whole * state_ref[0, h] + added[h]

        for n in range(PAIR):
            if chunks % PAIR == 0 or n == 0:
                chunk(n)
            else:  # an odd number of chunks leaves the last pair without its second
                pl.when(pl.program_id(2) < pairs - 1)(lambda n=n: chunk(n))

    def tokens(width):
        return pl.BlockSpec((None, PAIR * size, heads * width), lambda b, h, n: (b, n, h))

    def spec(x, length):
        return pl.BlockSpec((length, None, heads, *x.shape[3:]), lambda b, h, n: (n, b, h, 0, 0))

    out = jax.ShapeDtypeStruct(v.shape, dtype)
    last = jax.ShapeDtypeStruct(initial.shape, f32)
    saved = [jax.ShapeDtypeStruct((pairs, *initial.shape), dtype)] * save
    return pl.pallas_call(
        kernel,
        grid=(batch, all_heads // heads, pairs),
        in_specs=[
            tokens(key),
            tokens(key),
            tokens(value),
            spec(inverse, PAIR),
            spec(rows, PAIR),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[
            tokens(value),
            pl.BlockSpec((1, heads, *initial.shape[2:]), lambda b, h, n: (b, h, 0, 0)),
            *(spec(x, 1) for x in saved),
        ],
        out_shape=[out, last, *saved],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="gdn_chunk_scan",
    )(q, k, v, inverse, rows, initial)
