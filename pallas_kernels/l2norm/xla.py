"""Per-head L2 normalisation by groups, [..., heads, dim]: one fused pass on CPUs and GPUs."""

import jax
import jax.numpy as jnp
from jax import lax


def l2norm(x: jax.Array, heads: int, eps: float) -> jax.Array:
    """The contract of `pallas_kernels.l2norm.l2norm`."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide.reshape(*x.shape[:-1], heads, -1)
    return (wide * lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) + eps)).reshape(x.shape)
