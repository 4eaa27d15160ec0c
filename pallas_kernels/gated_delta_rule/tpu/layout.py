"""Memory layout of operands for the TPU kernels of the gated delta rule: [batch, tokens, heads *
width], heads side by side.

Projections write this layout, and a head is a whole number of vector registers in it. [tokens,
heads, width] has another layout: XLA would copy every operand and every result. Arrays between
kernels are [chunks, batch, heads, ...].
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp


def merge_heads(x: jax.Array, valid: jax.Array | None, size: int) -> jax.Array:
    """[batch, length, heads, width] -> [batch, chunks * size, heads * width], zeros at pads and
    beyond the end."""
    batch, length = x.shape[:2]
    x = x.reshape(batch, length, -1)
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    return jnp.pad(x, [(0, 0), (0, -length % size), (0, 0)])


def split_heads(x: jax.Array, length: int, heads: int) -> jax.Array:
    """The inverse: [batch, chunks * size, heads * width] -> [batch, length, heads, width]."""
    return x[:, :length].reshape(x.shape[0], length, heads, -1)


def tile(n: int, h: int, size: int, width: int) -> tuple:
    """The index of chunk n of head h in a block [chunks * size, heads * width]."""
    return pl.ds(n * size, size), pl.ds(h * width, width)
