"""Decays inside a chunk: D and d of xla.py, with an exact derivative in the gates."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.chunk_layout import split_chunks
from pallas_kernels.gated_delta_rule.xla_products import Product
from pallas_kernels.segments import segment_numbers

# Below it exp and its derivative are 0 in float32. Above it sums of 128 coarse gates are exact.
FLOOR = -200.0
COARSE = 256.0  # gates are split into a multiple of 1/COARSE and a rest

f32 = jnp.float32


def segment_masks(
    token_index: jax.Array | None, segment_ids: jax.Array | None, length: int, size: int
) -> tuple[jax.Array | None, jax.Array | None]:
    """Which pairs of tokens share a sequence [chunks, batch, 1, C, C], and which tokens share the
    sequence of the state before the chunk [chunks, batch, 1, C]. (None, None): all do."""
    if segment_ids is None:
        return None, None
    number = segment_numbers(token_index, segment_ids)
    # Tokens that fill up the last chunk are like pads.
    number = jnp.concatenate([number, jnp.repeat(number[:, -1:], -length % size, axis=1)], axis=1)
    number = split_chunks(number[:, :, None], size)  # [N, B, 1, C]
    # The first chunk's state belongs to segment 0.
    before = jnp.pad(number[:-1, ..., -1:], ((1, 0), (0, 0), (0, 0), (0, 0)))
    return number[..., :, None] == number[..., None, :], number == before


def running_sums(g: jax.Array) -> jax.Array:
    """g [..., C] -> [2, ..., C], two parts of the running sum of g.

    The parts are kept apart because differences of a plain running sum lose 1e-4 at sums of -2000.
    Sums of the coarse part are exact, and the fine part stays small.
    """
    coarse = jnp.round(g * COARSE) / COARSE
    return jnp.matmul(
        jnp.stack([coarse, g - coarse]), _lower(g.shape[-1]).T, precision=lax.Precision.HIGHEST
    )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def decays(
    g: jax.Array, pairs: jax.Array | None, carried: jax.Array | None, product: Product
) -> tuple[jax.Array, jax.Array]:
    """g [..., C] -> D [..., C, C] and d [..., C].

    pairs, carried: from `segment_masks`. product: of the derivative.
    """
    size = g.shape[-1]
    sums = running_sums(g)
    exponent = sum(sums[..., :, None] - sums[..., None, :])
    keep = _lower(size, bool) & ~jnp.eye(size, dtype=bool)
    if pairs is not None:
        keep &= pairs
    # Masked before exp: above the diagonal it would overflow.
    between = jnp.exp(jnp.where(keep, exponent, -jnp.inf)) + jnp.eye(size, dtype=f32)
    since = jnp.exp(sum(sums))
    return between, since if carried is None else jnp.where(carried, since, 0)


def _decays_forward(g, pairs, carried, product):
    between, since = decays(g, pairs, carried, product)
    return (between, since), (between, since)


def _decays_backward(product, residuals, ct):
    # g_t occurs in D_ij for i >= t > j and in d_i for i >= t. Only those terms are added. The
    # difference of row and column sums would lose the gradient where it is far smaller than its
    # terms (gates of e^-30).
    between, since = residuals
    size = since.shape[-1]
    strict = _lower(size, bool) & ~jnp.eye(size, dtype=bool)
    pairs = jnp.where(strict, ct[0] * between, 0)  # [..., i, j]
    dtype, precision = product.backward
    spanned = jnp.einsum(
        "...ij,it->...jt", pairs.astype(dtype), _lower(size, dtype), precision=precision
    )
    through_pairs = jnp.where(strict.T, spanned, 0).sum(-2)
    through_carried = jnp.matmul(ct[1] * since, _lower(size), precision=lax.Precision.HIGHEST)
    return through_pairs + through_carried, None, None


decays.defvjp(_decays_forward, _decays_backward)


def _lower(size, dtype=f32):
    return jnp.tri(size, dtype=dtype)
