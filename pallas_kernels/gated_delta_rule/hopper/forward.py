"""The gated delta rule with the residuals of its backward pass, by the forward kernels for Hopper
GPUs.

chunks.py computes everything that depends on no state, all chunks in parallel. chunk_scan.py goes
through the chunks with the state in registers and writes the outputs. It reads 32 KiB that the
first kernel wrote for each chunk of a head. Where few heads would leave multiprocessors idle, the
scan is cut into spans (spans.py), and span_transitions.py runs before it.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.hopper.chunk_scan import chunk_scan
from pallas_kernels.gated_delta_rule.hopper.chunks import CHUNK, KEY, chunks
from pallas_kernels.gated_delta_rule.hopper.span_transitions import span_transitions
from pallas_kernels.gated_delta_rule.hopper.spans import WIDTH, compose, spans_of


@partial(jax.jit, static_argnames="keep")  # a model's layers share one compiled kernel
def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    starts: jax.Array | None,
    initial_state: jax.Array | None,
    keep: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """out [B, T, H, V] bfloat16, the last state [B, H, 128, V] float32, two parts of T [B, H, N, 2,
    64, 64] bfloat16 and, if keep, the state before each of the N chunks [B, H, N, 128, V] bfloat16.

    q, k: [B, T, H, 128] and v: [B, T, H, V], bfloat16, zero at pads, T and V multiples of 64.
    g, beta: [B, H, T] float32, finite, zero at pads.
    starts: [B, T] float32, 1 for a token before which the state is reset, else 0. None: no resets.
    initial_state: [B, H, 128, V] float32. None: zeros.
    """
    inverse, scores, vectors = chunks(q, k, g, beta, starts)
    batch, length, heads, width = v.shape
    spans = spans_of(batch * heads, width // WIDTH, length // CHUNK)
    if spans > 1:
        first = jnp.zeros((batch, heads, KEY, width)) if initial_state is None else initial_state
        states = compose(first, span_transitions(k, v, inverse, vectors, first, spans))
    else:
        states = None if initial_state is None else initial_state[:, :, None]
    out, last, *states = chunk_scan(q, k, v, inverse, scores, vectors, states, keep)
    inverse = inverse.reshape(*inverse.shape[:3], 2, CHUNK, CHUNK)
    return out, last, inverse, states[0] if keep else None
