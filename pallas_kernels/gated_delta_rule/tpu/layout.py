"""How operands of the gated delta rule lie in memory for its TPU kernels: [batch, tokens, heads * width], heads side by side.

So projections write them, and there a head is a run of whole vector registers. [tokens, heads, width] would lie in another order, and XLA
copy every operand and every result. What the kernels hand to each other is [chunks, batch, heads, ...].
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp


def merge_heads(x: jax.Array, valid: jax.Array | None, size: int) -> jax.Array:
    """[batch, length, heads, width] -> [batch, chunks * size, heads * width]: zeros at pads and beyond the end."""
    batch, length = x.shape[:2]
    x = x.reshape(batch, length, -1)
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    return jnp.pad(x, [(0, 0), (0, -length % size), (0, 0)])


def split_heads(x: jax.Array, length: int, heads: int) -> jax.Array:
    """The way back: [batch, chunks * size, heads * width] -> [batch, length, heads, width]."""
    return x[:, :length].reshape(x.shape[0], length, heads, -1)


def tile(n: int, h: int, size: int, width: int) -> tuple:
    """Where chunk n of head h lies in a block [chunks * size, heads * width]."""
    return pl.ds(n * size, size), pl.ds(h * width, width)
