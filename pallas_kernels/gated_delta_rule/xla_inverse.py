"""T = (I + A)^-1 of every chunk, A strictly lower triangular, and its derivative."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.xla_products import Product, dot


def unit_lower_inverse(a: jax.Array) -> jax.Array:
    """(I + a)^-1 for strictly lower a [..., C, C], C a power of two.

    Blocks on the diagonal are inverted exactly and doubled in size until one is left:
    [[X, 0], [Y, Z]]^-1 = [[X', 0], [-Z' Y X', Z']]. For all blocks at once this is X - X S X, with
    S the part of a that joins their halves. No power of a is formed: powers can overflow where the
    inverse is small. Products are of whole matrices: small slices run slowly and, on TPU, compile
    very slowly.
    """
    size = a.shape[-1]
    multiply = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    place = jnp.arange(size)

    def joins(level):  # between the two halves of each block of 2^(level + 1)
        return (place[:, None] >> (level + 1) == place >> (level + 1)) & (
            place[:, None] >> level > place >> level
        )

    def double(level, inverse):
        return inverse - multiply(inverse, multiply(jnp.where(joins(level), a, 0), inverse))

    pairs = jnp.eye(size, dtype=a.dtype) - jnp.where(joins(0), a, 0)
    # A loop, because unrolled doublings would be compiled one by one.
    return lax.fori_loop(1, size.bit_length() - 1, double, pairs)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def known_inverse(a: jax.Array, inverse: jax.Array, product: Product) -> jax.Array:
    """`inverse`, which is (I + a)^-1, with its derivative in a."""
    return inverse


def _backward(product, inverse, ct):
    through = dot(ct, inverse.mT, product.backward)
    ct_a = -jnp.tril(dot(inverse.mT, through, product.backward), -1)
    return ct_a, jnp.zeros_like(inverse)


known_inverse.defvjp(lambda a, inverse, product: (inverse, inverse), _backward)
