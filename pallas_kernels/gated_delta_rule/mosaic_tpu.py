"""The gated delta rule on TPU: the contract of `xla.gated_delta_rule`, with Pallas kernels for what XLA is slow at.

Forward: `mosaic_tpu_inverse` makes T of every chunk, `mosaic_tpu_walk` walks over the chunks and writes the output. Backward: the
algebra inside chunks is `xla`'s own, in chunks of 128; between its halves `mosaic_tpu_walk_back` walks back. Chunks of 128 because an
MXU is 128 or 256 wide and half as many states pass through memory; rows of up to 64 tokens are one chunk of 64.

Static scores (benchmarks.tpu_scores; an estimate by the compiler's own account) and the assumptions behind them:
benchmarks/results/tpu_scores.jsonl.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.gated_delta_rule import xla
from pallas_kernels.gated_delta_rule.mosaic_tpu_gates import gate_rows
from pallas_kernels.gated_delta_rule.mosaic_tpu_inverse import inverse
from pallas_kernels.gated_delta_rule.mosaic_tpu_walk import walk
from pallas_kernels.gated_delta_rule.mosaic_tpu_walk_back import walk_back

CHUNK = 128
f32 = jnp.float32


def supports(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Why these arrays (or shapes with dtypes) are not for this implementation, or None if they are."""
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(f32)}:
        return f"dtypes {q.dtype}, {k.dtype} and {v.dtype}: all bfloat16 or all float32"
    if k.shape[3] not in (128, 256):
        return f"keys {k.shape[3]} wide: 128 or 256"
    if v.shape[3] not in (128, 256, 384, 512):
        return f"values {v.shape[3]} wide: a multiple of 128, up to 512"
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
    index: jax.Array | None = None,
    segment: jax.Array | None = None,
    *,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """Arguments, results and names of residuals as `xla.gated_delta_rule`; of "gdn_states", every second is kept, and "gdn_inverse"
    is two bfloat16 arrays where the inputs are bfloat16. `interpret` (pltpu.InterpretParams) runs the kernels without a TPU.

    Raises ValueError where `xla.check` does or `supports` objects.
    """
    xla.check(q, k, v, g, beta, initial_state)
    if reason := supports(q, k, v):
        raise ValueError(f"gated_delta_rule on TPU does not take {reason}\n  -> use the implementation xla")
    g, beta, initial_state = xla._start(k, v, g, beta, initial_state)
    return _delta_rule(q, k, v, g, beta, initial_state, index, segment, interpret)


def _chunk_size(length: int) -> int:
    return CHUNK if length > CHUNK // 2 else CHUNK // 2


def _heads(k, v) -> int:
    """Heads of a block: as many as the vector memory takes with two buffers of everything."""
    most = max(1, 8 * 128 * 256 // (k.shape[3] * v.shape[3]) // (k.dtype.itemsize // 2))
    return max(n for n in range(1, most + 1) if k.shape[2] % n == 0)


def _operands(index, size, *inputs):
    valid = None if index is None else index >= 0
    return [xla._split(xla._without_pads(x, valid), size) for x in inputs]


def _run(q, k, v, g, beta, initial_state, index, segment, interpret, save):
    length, size, heads = k.shape[1], _chunk_size(k.shape[1]), _heads(k, v)
    queries, keys, values = _operands(index, size, q, k, v)
    rows = gate_rows(g, beta, index, segment, size)
    parts = inverse(keys, rows, heads, save, interpret)
    parts = [checkpoint_name(x, "gdn_inverse") for x in parts]
    out, last, *states = walk(queries, keys, values, parts[0], rows, initial_state, heads, save, interpret)
    states = [checkpoint_name(x, "gdn_states") for x in states]
    return (xla._join(out, length), xla._kept(initial_state, last, index)), (parts, *states)


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _delta_rule(q, k, v, g, beta, initial_state, index, segment, interpret):
    return _run(q, k, v, g, beta, initial_state, index, segment, interpret, save=False)[0]


def _forward(q, k, v, g, beta, initial_state, index, segment, interpret):
    results, kept = _run(q, k, v, g, beta, initial_state, index, segment, interpret, save=True)
    return (checkpoint_name(results[0], "gdn_out"), results[1]), (q, k, v, g, beta, index, segment, *kept)


def _backward(interpret, residuals, cts):
    *inputs, parts, states = residuals
    q, k, v, g, beta, index, segment = inputs
    size, dtype = _chunk_size(k.shape[1]), k.dtype

    def back(chunks, ct_out, ct_last, how):
        rows = gate_rows(g, beta, index, segment, size)
        queries, keys = _operands(index, size, q, k)
        return walk_back(
            queries, keys, chunks.w.astype(dtype), ct_out.astype(dtype), rows, ct_last, _heads(k, v), interpret
        )

    kept = sum(x.astype(f32) for x in parts), states
    return xla._backward((*inputs, *kept), cts, xla._products(q, k, v), size, back, _all_states)


def _all_states(chunks, states, how):
    """The states before all chunks; `states` are those before every second."""
    pairs = chunks.decay.shape[0] // 2
    _, second = xla._outputs(jax.tree.map(lambda x: x[: 2 * pairs : 2], chunks), states[:pairs], how)
    both = jnp.stack([states[:pairs], second.astype(states.dtype)], axis=1)
    return jnp.concatenate([both.reshape(2 * pairs, *states.shape[1:]), states[pairs:]])


_delta_rule.defvjp(_forward, _backward)
