"""Reference for every implementation: dense masked softmax, in the precision of its inputs."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.api import complete
from pallas_kernels.attention.mask import Mask

BLOCK = 1000  # queries at a time


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_token_index: jax.Array | None = None,
    k_token_index: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    k_segment_ids: jax.Array | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.attention.attention`, with lse in the dtype of q.

    Time grows as Tq x Tk, memory as BLOCK x Tk.
    """
    call = complete(
        q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale
    )
    q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale = call
    group = q.shape[2] // k.shape[2]
    real = (k_token_index >= 0)[:, :, None, None]
    k, v = (jnp.repeat(jnp.where(real, x, 0), group, axis=2) for x in (k, v))

    @jax.checkpoint
    def block(rows):
        q, q_token_index, q_segment_ids = rows
        # [batch, 1, queries, keys]
        seen = mask.visible(q_token_index, k_token_index, q_segment_ids, k_segment_ids)[:, None]
        empty = ~seen.any(axis=-1, keepdims=True)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") * scale
        # A row without keys is kept finite, then erased.
        scores = jnp.where(empty, 0, jnp.where(seen, scores, -jnp.inf))
        weights = jnp.where(empty, 0, jax.nn.softmax(scores, axis=-1))
        lse = jnp.where(empty[..., 0], -jnp.inf, jax.nn.logsumexp(scores, axis=-1))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest"), lse.swapaxes(1, 2)

    batch, length = q_token_index.shape
    size = max(1, min(length, BLOCK))

    def cut(x, fill=0):
        x = jnp.pad(
            x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2), constant_values=fill
        )
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    blocks = cut(q), cut(q_token_index, -1), None if q_segment_ids is None else cut(q_segment_ids)
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :length],
        jax.lax.map(block, blocks),
    )
