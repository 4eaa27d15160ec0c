"""The scan over the chunks, forward and backward, and the outputs."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.xla_chunks import Chunks
from pallas_kernels.gated_delta_rule.xla_products import Products, dot, matmul


def chunk_scan(chunks: Chunks, state: jax.Array, products: Products) -> tuple[jax.Array, jax.Array]:
    """The state before each chunk [chunks, batch, heads, K, V] in the dtype of its products, and
    the last state in float32."""
    dtype = products.state.forward[0]

    def chunk(state, x):
        w, u, keys, decay = x
        new = u - matmul(w, state, products.state)
        return decay * state + matmul(keys, new, products.update), state.astype(dtype)

    last, states = lax.scan(
        chunk, state, (chunks.w.astype(dtype), chunks.u, chunks.keys, chunks.decay)
    )
    return states, last


def outputs(chunks: Chunks, states: jax.Array, products: Products) -> tuple[jax.Array, jax.Array]:
    """The chunks' outputs and the states after them, given the state before each chunk."""
    new = chunks.u - matmul(chunks.w, states, products.state)
    out = matmul(chunks.queries, states, products.state)
    out = out + matmul(chunks.scores, new, products.chunk)
    return out, chunks.decay * states + matmul(chunks.keys, new, products.update)


def chunk_scan_backward(
    chunks: Chunks, ct_out: jax.Array, ct_last: jax.Array, products: Products
) -> tuple[jax.Array, jax.Array]:
    """The gradient in the state after each chunk [chunks, batch, heads, K, V] in the dtype of its
    products, and the gradient in the initial state in float32."""
    dtype = products.state.backward[0]
    readers = jnp.concatenate([chunks.queries, -chunks.w], axis=-2).mT.astype(dtype)  # [K, 2 C]
    # [C, V], without what comes through the state after the chunk
    ct_new = dot(chunks.scores.mT, ct_out, products.chunk.backward)

    def chunk(ct, x):
        readers, keys, ct_out, ct_new, decay = x
        ct_new = ct_new + dot(keys.mT, ct, products.state.backward)
        read = jnp.concatenate([ct_out, ct_new.astype(dtype)], axis=-2)
        return decay * ct + dot(readers, read, products.state.backward), ct.astype(dtype)

    xs = (readers, chunks.keys.astype(dtype), ct_out.astype(dtype), ct_new, chunks.decay)
    first, cts = lax.scan(chunk, ct_last, xs, reverse=True)
    return cts, first
