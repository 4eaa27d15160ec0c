"""How implementations lay out tokens in chunks: pads zeroed, rows cut into chunks, chunks first."""

import math

import jax
import jax.numpy as jnp


def without_pads(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """x with zeros at pads. valid: bool, of x's leading axes; None: no pads."""
    if valid is None:
        return x
    return jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim)), x, 0)


def split_chunks(x: jax.Array, size: int) -> jax.Array:
    """[batch, length, heads, ...] -> [chunks, batch, heads, size, ...], zeros after the end."""
    batch, length, heads = x.shape[:3]
    chunks = math.ceil(length / size)
    x = jnp.pad(x, [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(batch, chunks, size, heads, *x.shape[3:])
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def join_chunks(x: jax.Array, length: int) -> jax.Array:
    """The inverse: [chunks, batch, heads, size, V] -> [batch, length, heads, V]."""
    chunks, batch, heads, size, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, chunks * size, heads, width)[:, :length]
