"""Everything inside a chunk that depends on no state, for all chunks in parallel."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.gated_delta_rule.api import repeat_key_heads
from pallas_kernels.gated_delta_rule.chunk_layout import split_chunks, without_pads
from pallas_kernels.gated_delta_rule.tuning import XLA as Tuning
from pallas_kernels.gated_delta_rule.xla_decays import FLOOR, decays, segment_masks
from pallas_kernels.gated_delta_rule.xla_inverse import known_inverse, unit_lower_inverse
from pallas_kernels.gated_delta_rule.xla_products import Products, matmul

f32 = jnp.float32


class Chunks(NamedTuple):
    """Per chunk, in the notation of xla.py, [chunks, batch, value_heads, ...] float32."""

    inverse: jax.Array  # T [C, C]
    u: jax.Array  # [C, V]
    w: jax.Array  # [C, K]
    queries: jax.Array  # d Q [C, K]
    keys: jax.Array  # (D_C K)^T [K, C]
    scores: jax.Array  # Q K^T * D [C, C]
    decay: jax.Array  # d_C [1, 1]


def chunk_size(length: int) -> int:
    """Tokens of a chunk in rows of this length."""
    return min(Tuning.chunk, max(Tuning.smallest, 1 << (length - 1).bit_length()))


def prepare(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    token_index: jax.Array | None,
    segment_ids: jax.Array | None,
    products: Products,
    size: int,
    invert: Callable[[jax.Array], jax.Array] = unit_lower_inverse,
) -> Chunks:
    """All chunks of `size` tokens. invert: makes T from A, or returns it where it is known."""
    length, heads = v.shape[1:3]
    valid = None if token_index is None else token_index >= 0
    q, k, v, g, beta = (
        split_chunks(without_pads(x, valid), size).astype(f32) for x in (q, k, v, g, beta)
    )

    def per_value_head(x):
        return repeat_key_heads(x, heads)

    between, since = decays(
        jnp.maximum(g, FLOOR), *segment_masks(token_index, segment_ids, length, size),
        products.chunk,
    )  # fmt: skip
    gram = per_value_head(matmul(k, k.mT, products.gram))
    a = jnp.tril(beta[..., None] * gram * between, -1)
    inverse = known_inverse(a, checkpoint_name(invert(a), "gdn_inverse"), products.chunk)
    queries, keys = per_value_head(q), per_value_head(k)
    return Chunks(
        inverse=inverse,
        u=matmul(inverse, beta[..., None] * v, products.chunk),
        w=matmul(inverse, (beta * since)[..., None] * keys, products.chunk),
        queries=since[..., None] * queries,
        keys=(between[..., -1, :, None] * keys).mT,
        scores=per_value_head(matmul(q, k.mT, products.gram)) * between,
        decay=since[..., -1:, None],
    )
