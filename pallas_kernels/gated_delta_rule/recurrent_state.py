"""The state that a call starts from and the one it returns."""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.api import repeat_key_heads

f32 = jnp.float32


def start_in_float32(
    k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, initial_state: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """g, beta and the initial state in float32. None becomes zeros [batch, value_heads, K, V]."""
    if initial_state is None and not k.shape[1]:
        shape = k.shape[0], v.shape[2], k.shape[3], v.shape[3]
        initial_state = jnp.zeros(shape, f32)
    if initial_state is None:  # made from the inputs, so that it is sharded as they are
        keys = repeat_key_heads(k[:, 0, :, :, None], v.shape[2], axis=1)
        initial_state = jnp.zeros_like(keys, f32) + jnp.zeros_like(v[:, 0, :, None, :], f32)
    return g.astype(f32), beta.astype(f32), initial_state.astype(f32)


def last_state(
    initial_state: jax.Array, last: jax.Array, token_index: jax.Array | None
) -> jax.Array:
    """The state after each row. A row without valid tokens keeps its initial state bit for bit:
    the computation adds 0, which turns -0 into 0."""
    if token_index is None:
        return last
    return jnp.where((token_index >= 0).any(1)[:, None, None, None], last, initial_state)
