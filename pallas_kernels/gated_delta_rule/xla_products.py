"""Matrix products of the portable gated delta rule: operand dtypes and precisions."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

f32 = jnp.float32


class Product(NamedTuple):
    """Operand dtype and precision of a product, and of the products in its derivative. The result
    is float32."""

    forward: tuple
    backward: tuple


class Products(NamedTuple):
    """The kinds of products."""

    gram: Product  # of inputs with inputs
    chunk: Product  # of anything else inside a chunk
    state: Product  # with a state or a state's gradient
    update: Product  # what a chunk adds to the state


def products_of(*inputs: jax.Array) -> Products:
    """How to multiply for inputs of these dtypes."""
    full = (f32, lax.Precision.HIGHEST)
    if any(x.dtype != jnp.bfloat16 for x in inputs):
        return Products(*[Product(full, full)] * 4)
    # One bfloat16 pass is exact for products of bfloat16 inputs. Derived values inside a chunk need
    # more bits, or gate gradients are wrong. So does the update of the state, where one key may
    # repeat many times.
    once, more = (jnp.bfloat16, lax.Precision.DEFAULT), (f32, lax.Precision.HIGH)
    return Products(
        gram=Product(once, more),
        chunk=Product(more, more),
        state=Product(once, once),
        update=Product(more, more),
    )


def dot(a: jax.Array, b: jax.Array, operands: tuple) -> jax.Array:
    """a @ b with this operand dtype and precision, float32 out."""
    dtype, precision = operands
    return jnp.matmul(
        a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=f32
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(a: jax.Array, b: jax.Array, product: Product) -> jax.Array:
    """a @ b over equal leading axes, float32 out. Its derivative has operand dtypes of its own."""
    return dot(a, b, product.forward)


def _matmul_backward(product, operands, ct):
    a, b = operands
    ct_a, ct_b = dot(ct, b.mT, product.backward), dot(a.mT, ct, product.backward)
    return ct_a.astype(a.dtype), ct_b.astype(b.dtype)


matmul.defvjp(lambda a, b, product: (dot(a, b, product.forward), (a, b)), _matmul_backward)
