"""The gradients of the gated delta rule by the backward kernels for Hopper GPUs.

chunk_scan_backward.py carries the gradient of the state through the chunks, last to first.
gradients.py then computes all chunks in parallel. It reads 96 KiB that the first kernel wrote for
each chunk of a head, with V 256. Where few heads would leave multiprocessors idle, the backward
scan is cut into spans (spans.py).
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.chunk_scan_backward import (
    CHUNK,
    SINCE,
    chunk_scan_backward,
    span_transitions_backward,
)
from pallas_kernels.gated_delta_rule.hopper.gradients import gradients
from pallas_kernels.gated_delta_rule.hopper.gradients_memory import (
    D_BETA,
    D_BETA_TOO,
    D_GATE,
    PRODUCT,
)
from pallas_kernels.gated_delta_rule.hopper.spans import WIDTH, compose, spans_of

f32 = jnp.float32


@jax.jit  # a model's layers share one compiled kernel
def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    segments: jax.Array | None,
    inverse: jax.Array,
    states: jax.Array,
    d_out: jax.Array,
    d_last: jax.Array,
) -> tuple[jax.Array, ...]:
    """dq, dk, dv in bfloat16, dg and dbeta [B, H, T] float32, and the gradient of the initial state
    [B, H, 128, V] float32. dg is not zero at pads.

    q, k: [B, T, H, 128], v, d_out: [B, T, H, V], bfloat16, zero at pads, T and V multiples of 64.
    g, beta: [B, H, T] float32, finite, zero at pads.
    segments: [B, T] int32 from `segment_numbers`; None: no row is packed.
    inverse: from `forward`, [B, H, N, 64, 64] bfloat16, or [B, H, N, 2, 64, 64], two parts of T.
    states: from `forward`, [B, H, N, 128, V] bfloat16.
    d_last: [B, H, 128, V] float32.
    """
    inverse = inverse.reshape(*inverse.shape[:3], -1, CHUNK, CHUNK)
    vectors = gate_vectors(g, beta, segments)
    batch, length, heads, width = d_out.shape
    # Two spans were not measured. They should save nothing: without results to write, the backward
    # scan is hardly faster.
    spans = spans_of(batch * heads, width // WIDTH, length // CHUNK, back=True)
    if spans > 1:
        d_ends = compose(
            d_last, span_transitions_backward(q, k, d_out, inverse, vectors, d_last, spans)
        )
    else:
        d_ends = d_last[:, :, None]
    x, d_states, d_first = chunk_scan_backward(q, k, d_out, inverse, vectors, d_ends)
    dq, dk, dv, sums = gradients(q, k, v, d_out, inverse, states, x, d_states, vectors)
    product = vectors[:, :, :, SINCE, -1:] * sums[:, :, :, PRODUCT].sum(-1, keepdims=True)
    dg = sums[:, :, :, D_GATE] + product
    dbeta = sums[:, :, :, D_BETA] + sums[:, :, :, D_BETA_TOO]
    return dq, dk, dv, dg.reshape(g.shape), dbeta.reshape(beta.shape), d_first


def gate_vectors(g: jax.Array, beta: jax.Array, segments: jax.Array | None) -> jax.Array:
    """The vectors of `chunk_scan_backward`, in the order of its constants, from g and beta [B, H,
    T]."""
    batch, heads, _ = g.shape
    g, beta = (x.reshape(batch, heads, -1, CHUNK) for x in (g, beta))
    sums = jnp.matmul(g, jnp.tri(CHUNK, dtype=f32).T, precision=lax.Precision.HIGHEST)
    since, until = jnp.exp(sums), jnp.exp(sums[..., -1:] - sums)
    segment = jnp.zeros_like(g)
    if segments is not None:
        segments = segments.reshape(batch, 1, -1, CHUNK)
        # The first chunk's state belongs to segment 0.
        before = jnp.pad(segments[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))
        since = jnp.where(segments == before, since, 0)
        until = jnp.where(segments == segments[..., -1:], until, 0)
        segment = jnp.broadcast_to(segments.astype(f32), g.shape)
    return jnp.stack([sums, since, beta, until, segment], axis=3)
