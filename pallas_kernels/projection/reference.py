"""Reference: the definition of the projection, in the precision of the inputs."""

import jax
import jax.numpy as jnp


def projection(
    x, weight, bias=None, residual=None, norm=None, prefetch=None, eps=1e-6, transposed=False
) -> jax.Array:
    """The contract of `pallas_kernels.projection.projection`."""
    if norm is not None:
        x = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * norm
    if transposed:
        weight = jnp.moveaxis(weight, -1, 0)
    y = jnp.tensordot(x, weight, 1, precision="highest")
    y = y if bias is None else y + bias
    y = y if y.ndim == 2 else y[:, 0] * jax.nn.sigmoid(y[:, 0]) * y[:, 1]
    return y if residual is None else y + residual
