"""Dense replacements of the Hopper kernels, to test their surroundings without a GPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.hopper import backward as hopper_attention_backward
from pallas_kernels.attention.hopper import forward as hopper_attention_forward
from pallas_kernels.gated_delta_rule import xla
from pallas_kernels.gated_delta_rule.hopper import backward as hopper_delta_backward
from pallas_kernels.gated_delta_rule.hopper import chunks
from pallas_kernels.gated_delta_rule.hopper import forward as hopper_delta_forward


def replace(monkeypatch):
    """Replace the kernels until the test ends."""
    monkeypatch.setattr(hopper_attention_forward, "forward", attention_forward)
    monkeypatch.setattr(hopper_attention_backward, "backward", attention_backward)
    monkeypatch.setattr(hopper_delta_forward, "forward", delta_forward)
    monkeypatch.setattr(hopper_delta_backward, "backward", delta_backward)


def attention_forward(q, k, v, first, last, scale):
    scores, weights, lse = _dense(q, k, first, last, scale)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2).astype(jnp.float32)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).astype(q.dtype), lse


def attention_backward(q, k, v, d_out, lse, shift, first, last, scale):
    group = q.shape[2] // k.shape[2]
    q, k, v, d_out = (x.astype(jnp.float32) for x in (q, k, v, d_out))
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    row = jnp.arange(q.shape[1])
    seen = (row >= first[:, :, None]) & (row <= last[:, :, None])  # [batch, keys, queries]
    scores = jnp.einsum("bqhd,bkhd->bhkq", q, k) * scale
    weights = jnp.where(seen[:, None], jnp.exp(scores - lse[:, :, None]), 0)
    d_scores = weights * (jnp.einsum("bqhd,bkhd->bhkq", d_out, v) - shift[:, :, None]) * scale
    d_q = jnp.einsum("bhkq,bkhd->bqhd", d_scores, k)
    d_k, d_v = (
        jnp.einsum("bhkq,bqhd->bkhd", d_scores, q),
        jnp.einsum("bhkq,bqhd->bkhd", weights, d_out),
    )
    return d_q, *(x.reshape(*x.shape[:2], -1, group, x.shape[3]).sum(axis=3) for x in (d_k, d_v))


def _dense(q, k, first, last, scale):
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    row = jnp.arange(k.shape[1])
    seen = (row >= first[:, :, None]) & (row <= last[:, :, None])
    scores = jnp.einsum("bqhd,bkhd->bhqk", q.astype(jnp.float32), k.astype(jnp.float32)) * scale
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    return scores, jnp.where(seen[:, None], jnp.exp(scores - lse[..., None]), 0), lse


def delta_forward(q, k, v, g, beta, starts, initial_state, keep):
    batch, length, heads, width = k.shape
    assert length % chunks.CHUNK == 0
    g, beta = g.swapaxes(1, 2), beta.swapaxes(1, 2)
    segment_ids = None if starts is None else jnp.cumsum(starts, axis=1)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, width, v.shape[3]))
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    (out, last), (inverse, states) = xla.forward(*wide, g, beta, initial_state, None, segment_ids)
    return (
        out.astype(q.dtype),
        last,
        jnp.moveaxis(inverse, 0, 2).astype(jnp.bfloat16),
        jnp.moveaxis(states, 0, 2).astype(jnp.bfloat16) if keep else None,
    )


def delta_backward(q, k, v, g, beta, segments, inverse, states, d_out, d_last):
    dtype = q.dtype
    q, k, v, states, d_out = (x.astype(jnp.float32) for x in (q, k, v, states, d_out))
    inputs = q, k, v, g.swapaxes(1, 2), beta.swapaxes(1, 2), states[:, :, 0]
    _, pull = jax.vjp(lambda *a: xla.gated_delta_rule(*a, None, segments), *inputs)
    dq, dk, dv, dg, dbeta, d_initial = pull((d_out, d_last))
    dq, dk, dv = (d.astype(dtype) for d in (dq, dk, dv))
    return dq, dk, dv, dg.swapaxes(1, 2), dbeta.swapaxes(1, 2), d_initial
