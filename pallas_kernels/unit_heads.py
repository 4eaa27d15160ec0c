"""Division of each head by its length, heads side by side: what the queries, the keys and the gated norm of Gated DeltaNet have in common.

Two ways to sum over a head. By groups, [..., heads, width], is one fused pass on CPUs and GPUs. On TPUs that shape lies in memory in
another order, and XLA copies x there and back; products with the 0/1 matrix of which channel belongs to which head leave everything in its
place. By static score on v5e a Gated DeltaNet layer with 16 heads and 8,192 tokens took 6.1 ms forward with them and 10.4 with groups (5.7
since the convolution has a kernel).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def unit_heads(x: jax.Array, heads: int, eps: float) -> jax.Array:
    """x / sqrt(sum of x^2 over the head + eps), [..., heads * width] -> the same shape in float32 (float64 for float64)."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide.reshape(*x.shape[:-1], heads, -1)
    return (wide * lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + eps)).reshape(x.shape)


def unit_heads_by_products(x: jax.Array, heads: int, eps: float) -> jax.Array:
    """The same, by products with a 0/1 matrix in full float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    channel, head = (lax.broadcasted_iota(jnp.int32, (x.shape[-1], heads), axis) for axis in (0, 1))
    member = (channel // (x.shape[-1] // heads) == head).astype(wide.dtype)
    squares = jnp.einsum("...c,ch->...h", wide * wide, member, precision="highest")
    return wide * jnp.einsum("...h,ch->...c", lax.rsqrt(squares + eps), member, precision="highest")


def unit_heads_for(device: jax.Device) -> Callable:
    """The one of the two that is faster on a device."""
    return unit_heads_by_products if device.platform == "tpu" else unit_heads
