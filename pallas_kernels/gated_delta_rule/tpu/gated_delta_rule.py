"""The gated delta rule on TPU, with Pallas kernels for the parts that XLA is slow at.

Forward: inverse.py computes T of every chunk, chunk_scan.py scans the chunks and writes the output.
Backward: backward.py scans back and writes all gradients. Chunks are 128 tokens: an MXU is 128 or
256 wide, and half as many states pass through memory as with 64. Rows of up to 64 tokens are one
chunk of 64.

Static scores, estimates from the compiler's own output, and their assumptions:
benchmarks.tpu_scores, benchmarks/results/tpu_scores.jsonl.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.gated_delta_rule.api import check
from pallas_kernels.gated_delta_rule.chunk_layout import join_chunks, without_pads
from pallas_kernels.gated_delta_rule.recurrent_state import last_state, start_in_float32
from pallas_kernels.gated_delta_rule.tpu.backward import backward
from pallas_kernels.gated_delta_rule.tpu.chunk_scan import chunk_scan
from pallas_kernels.gated_delta_rule.tpu.gates import gate_rows
from pallas_kernels.gated_delta_rule.tpu.inverse import inverse
from pallas_kernels.gated_delta_rule.tpu.layout import merge_heads, split_heads
from pallas_kernels.gated_delta_rule.tuning import TPU as TPUDelta
from pallas_kernels.gated_delta_rule.xla_decays import FLOOR

f32 = jnp.float32


def supports(q: jax.Array, k: jax.Array, v: jax.Array, *_, **__) -> str | None:
    """Returns the reason it does not take these arrays (or shapes with dtypes), else None."""
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(f32)}:
        return f"dtypes {q.dtype}, {k.dtype} and {v.dtype}: all bfloat16 or all float32"
    if k.shape[3] not in (128, 256):
        return f"keys {k.shape[3]} wide: 128 or 256"
    if v.shape[3] not in (128, 256, 384, 512):
        return f"values {v.shape[3]} wide: a multiple of 128, up to 512"
    if k.shape[2] != v.shape[2]:
        return f"{k.shape[2]} key heads for {v.shape[2]} value heads: as many of each"
    if k.shape[1] < 2:
        return f"rows of {k.shape[1]} tokens: at least 2 (one token is a step, not a chunk)"
    if not (k.shape[0] and k.shape[2]):
        return "no rows or no heads"
    return None


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    initial_state: jax.Array | None = None,
    token_index: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.gated_delta_rule.gated_delta_rule`.

    Every second state of "gdn_states" is saved. With bfloat16 inputs "gdn_inverse" is two bfloat16
    arrays. interpret: pltpu.InterpretParams runs the kernels without a TPU. Raises ValueError where
    `check` does or `supports` gives a reason.
    """
    check(q, k, v, g, beta, initial_state)
    if reason := supports(q, k, v):
        raise ValueError(
            f"gated_delta_rule on TPU does not take {reason}\n  -> use the implementation xla"
        )
    g, beta, initial_state = start_in_float32(k, v, g, beta, initial_state)
    return _delta_rule(q, k, v, g, beta, initial_state, token_index, segment_ids, interpret)


def chunk_size(length: int) -> int:
    return TPUDelta.chunk if length > TPUDelta.chunk // 2 else TPUDelta.chunk // 2


def block_heads(heads: int, key: int, value: int, dtype, most: int = TPUDelta.forward) -> int:
    """Heads of a block: as many as fit into vector memory with two buffers of everything. `most` is
    for K 128, V 256 and bfloat16."""
    most = max(1, most * 128 * 256 // (key * value) // (jnp.dtype(dtype).itemsize // 2))
    return max(n for n in range(1, most + 1) if heads % n == 0)


def _operands(token_index, size, *inputs):
    valid = None if token_index is None else token_index >= 0
    return [merge_heads(x, valid, size) for x in inputs]


def _run(q, k, v, g, beta, initial_state, token_index, segment_ids, interpret, save):
    length, size, heads = (
        k.shape[1],
        chunk_size(k.shape[1]),
        block_heads(*k.shape[2:], v.shape[3], k.dtype),
    )
    queries, keys, values = _operands(token_index, size, q, k, v)
    rows = gate_rows(g, beta, token_index, segment_ids, size)
    parts = inverse(keys, rows, heads, save, interpret)
    parts = [checkpoint_name(x, "gdn_inverse") for x in parts]
    out, last, *states = chunk_scan(
        queries, keys, values, parts[0], rows, initial_state, heads, save, interpret
    )
    states = [checkpoint_name(x, "gdn_states") for x in states]
    return (split_heads(out, length, k.shape[2]), last_state(initial_state, last, token_index)), (
        parts,
        *states,
    )


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _delta_rule(q, k, v, g, beta, initial_state, token_index, segment_ids, interpret):
    return _run(q, k, v, g, beta, initial_state, token_index, segment_ids, interpret, save=False)[0]


def _forward(q, k, v, g, beta, initial_state, token_index, segment_ids, interpret):
    results, kept = _run(
        q, k, v, g, beta, initial_state, token_index, segment_ids, interpret, save=True
    )
    return (checkpoint_name(results[0], "gdn_out"), results[1]), (
        q,
        k,
        v,
        g,
        beta,
        token_index,
        segment_ids,
        *kept,
    )


def _backward(interpret, residuals, cts):
    *inputs, parts, states = residuals
    q, k, v, g, beta, token_index, segment_ids = inputs
    length, size = k.shape[1], chunk_size(k.shape[1])
    queries, keys, values, ct_out = _operands(token_index, size, q, k, v, cts[0].astype(v.dtype))
    rows = gate_rows(g, beta, token_index, segment_ids, size)
    heads = block_heads(*k.shape[2:], v.shape[3], k.dtype, TPUDelta.backward)
    *ours, gates, ct_initial = backward(
        queries, keys, values, parts, rows, states, ct_out, cts[1].astype(f32), heads, interpret
    )
    gates = [join_chunks(gates[..., i, :, None], length)[..., 0] for i in range(2)]
    valid = None if token_index is None else token_index >= 0
    dq, dk, dv, dg, dbeta = (
        without_pads(x, valid)
        for x in (*(split_heads(x, length, k.shape[2]) for x in ours), *gates)
    )
    return dq, dk, dv, jnp.where(g > FLOOR, dg, 0), dbeta, ct_initial, None, None


_delta_rule.defvjp(_forward, _backward)
