"""The gated delta rule in chunks, in plain XLA: runs on every backend.

First everything inside a chunk that needs no state, for all chunks in parallel (xla_chunks.py).
Then a scan over the chunks (xla_chunk_scan.py).

Notation for one head and one chunk of C tokens, with S the state before it:

    D_ij = exp(g_(j+1) + ... + g_i) for i >= j, 0 above the diagonal: decay from token j to token i
    d_i  = exp(g_1 + ... + g_i): decay from the state before the chunk to token i
    A    = strictly lower part of (beta_i k_i.k_j D_ij),  T = (I + A)^-1
    u    = T (beta V),  w = T (beta d K)
    new  = u - w S: what each token adds to the state
    out  = (d Q) S + (Q K^T * D) new
    S'   = d_C S + (D_C K)^T new, with D_C the last row of D

D and d keep the sequences of a packed row apart. D_ij is 0 between tokens of different sequences.
d_i is 0 for a token outside the sequence of S. A reset is therefore exact. A pad has q, k, v, beta
and g zero, so it changes nothing.

Gates, beta, d, D, T and S are float32. Arrays are [chunks, batch, heads, C, ...]: the scan takes
slices of the leading axis.

With fewer key heads than value heads, K K^T and Q K^T are computed once for each key head, and the
backward pass saves q and k as they came. What a decay multiplies is computed for each value head.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.gated_delta_rule.api import check, repeat_key_heads
from pallas_kernels.gated_delta_rule.chunk_layout import join_chunks, split_chunks, without_pads
from pallas_kernels.gated_delta_rule.recurrent_state import last_state, start_in_float32
from pallas_kernels.gated_delta_rule.xla_chunk_scan import chunk_scan, chunk_scan_backward, outputs
from pallas_kernels.gated_delta_rule.xla_chunks import chunk_size, prepare
from pallas_kernels.gated_delta_rule.xla_products import products_of

f32 = jnp.float32


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    initial_state: jax.Array | None = None,
    token_index: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.gated_delta_rule.gated_delta_rule`."""
    check(q, k, v, g, beta, initial_state)
    g, beta, initial_state = start_in_float32(k, v, g, beta, initial_state)
    if not k.size:
        return jnp.zeros_like(v), initial_state
    if k.shape[1] == 1:
        return _token(q, k, v, g, beta, initial_state, token_index)
    return _delta_rule(q, k, v, g, beta, initial_state, token_index, segment_ids)


def _token(q, k, v, g, beta, state, token_index):
    """One token: the definition, with the state read once for both k^T S and q^T S. A single token
    meets no change of segment."""
    valid = None if token_index is None else token_index[:, 0] >= 0
    q, k, v_, g, beta = (without_pads(x[:, 0], valid) for x in (q, k, v, g, beta))
    q, k = (repeat_key_heads(x, v.shape[2], axis=1) for x in (q, k))
    q, k, v_ = (x.astype(f32) for x in (q, k, v_))
    decay = jnp.exp(g)[..., None]  # [B, H, 1]
    update = beta[..., None] * (v_ - decay * jnp.sum(k[..., None] * state, axis=-2))  # [B, H, V]
    out = decay * jnp.sum(q[..., None] * state, axis=-2)
    out = out + jnp.sum(q * k, axis=-1, keepdims=True) * update
    new = decay[..., None] * state + k[..., None] * update[..., None, :]  # [B, H, K, V]
    if valid is not None:
        out = without_pads(out, valid)
        new = jnp.where(valid[:, None, None, None], new, state)
    return out[:, None].astype(v.dtype), new


def forward(q, k, v, g, beta, initial_state, token_index, segment_ids):
    """(out, last state), and what the backward pass saves: T and the state before each chunk."""
    products = products_of(q, k, v)
    size = chunk_size(k.shape[1])
    chunks = prepare(q, k, v, g, beta, token_index, segment_ids, products, size)
    states, last = chunk_scan(chunks, initial_state, products)
    states = checkpoint_name(states, "gdn_states")
    out, _ = outputs(chunks, states, products)
    out = join_chunks(out.astype(v.dtype), k.shape[1])
    return (out, last_state(initial_state, last, token_index)), (chunks.inverse, states)


@jax.custom_vjp
def _delta_rule(q, k, v, g, beta, initial_state, token_index, segment_ids):
    return forward(q, k, v, g, beta, initial_state, token_index, segment_ids)[0]


def _delta_rule_forward(q, k, v, g, beta, initial_state, token_index, segment_ids):
    (out, last), saved = forward(q, k, v, g, beta, initial_state, token_index, segment_ids)
    residuals = (q, k, v, g, beta, token_index, segment_ids, *saved)
    return (checkpoint_name(out, "gdn_out"), last), residuals


def _delta_rule_backward(residuals, cts):
    return backward(residuals, cts, chunk_size(residuals[0].shape[1]))


def backward(residuals: tuple, cts: tuple, size: int) -> tuple:
    """Gradients in the arguments of `forward`, in chunks of `size` tokens.

    residuals: q, k, v, g, beta, token_index, segment_ids, T, the state before each chunk.
    cts: cotangents of out and the last state.
    """
    q, k, v, g, beta, token_index, segment_ids, inverse, states = residuals
    ct_out, ct_last = cts
    products = products_of(q, k, v)
    valid = None if token_index is None else token_index >= 0
    ct_out = split_chunks(without_pads(ct_out, valid), size).astype(f32)

    def again(*inputs):
        return prepare(*inputs, token_index, segment_ids, products, size, lambda a: inverse)

    chunks, pull = jax.vjp(again, q, k, v, g, beta)
    _, pull_outputs = jax.vjp(lambda chunks: outputs(chunks, states, products), chunks)
    ct_states, ct_initial = chunk_scan_backward(chunks, ct_out, ct_last.astype(f32), products)
    return *pull(*pull_outputs((ct_out, ct_states.astype(f32)))), ct_initial, None, None


_delta_rule.defvjp(_delta_rule_forward, _delta_rule_backward)
