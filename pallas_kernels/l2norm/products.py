"""Per-head L2 normalisation by products with a 0/1 matrix of which channel belongs to which head.

For TPUs: there [..., heads, dim] has another memory layout, and XLA would copy x to it and back.
Products leave x in place.
"""

import jax
import jax.numpy as jnp
from jax import lax


def l2norm(x: jax.Array, heads: int, eps: float) -> jax.Array:
    """The contract of `pallas_kernels.l2norm.l2norm`; products are in full float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    channel, head = (lax.broadcasted_iota(jnp.int32, (x.shape[-1], heads), axis) for axis in (0, 1))
    member = (channel // (x.shape[-1] // heads) == head).astype(wide.dtype)
    squares = jnp.einsum("...c,ch->...h", wide * wide, member, precision="highest")
    return wide * jnp.einsum("...h,ch->...c", lax.rsqrt(squares + eps), member, precision="highest")
