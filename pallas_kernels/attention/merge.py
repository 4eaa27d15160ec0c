"""Merges attention over disjoint sets of keys into attention over their union."""

import jax
import jax.numpy as jnp


def merge(
    out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of two disjoint sets of keys, from attention over each.

    out_a, out_b: [..., D]; lse_a, lse_b: [...], log-sum-exp of the scores, -inf (with out 0) where
    a set is empty. Returns out (dtype of out_a) and lse. If one set is empty, the other comes back
    bit for bit; if both are, out is 0 and lse -inf. Differentiable in all four, with zero gradients
    towards empty sets.
    """
    top = jax.lax.stop_gradient(jnp.maximum(lse_a, lse_b))
    top = jnp.where(top == -jnp.inf, 0, top)
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    empty = total == 0
    total = jnp.where(empty, 1, total)
    out = (weight_a[..., None] * out_a + weight_b[..., None] * out_b) / total[..., None]
    return out.astype(out_a.dtype), jnp.where(empty, -jnp.inf, top + jnp.log(total))
