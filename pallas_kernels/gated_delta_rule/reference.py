"""Reference: the definition of the gated delta rule, token by token, in the precision of the
inputs."""

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule.api import repeat_key_heads

BLOCK = 1000  # tokens between the states that gradients keep


def gated_delta_rule(q, k, v, g, beta, initial_state=None, token_index=None, segment_ids=None):
    """The contract of `pallas_kernels.gated_delta_rule.gated_delta_rule`; float64 inputs are
    computed in float64."""
    batch, length, _, width = k.shape
    heads = v.shape[2]
    q, k = (repeat_key_heads(x, heads) for x in (q, k))
    valid = jnp.ones((batch, length), bool) if token_index is None else token_index >= 0
    segment_ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    q, k, v = (jnp.where(valid[:, :, None, None], x, 0) for x in (q, k, v))
    state = (
        jnp.zeros((batch, heads, width, v.shape[-1]), g.dtype)
        if initial_state is None
        else initial_state
    )

    def token(carry, x):
        state, started, last = carry
        q, k, v, g, beta, valid, segment_ids = x
        here = valid[:, None, None, None]
        reset = (valid & started & (segment_ids != last))[:, None, None, None]
        new = jnp.exp(g)[..., None, None] * jnp.where(reset, 0, state)
        update = beta[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", new, k))
        new = new + k[..., :, None] * update[..., None, :]
        out = jnp.where(here[..., 0], jnp.einsum("bhkv,bhk->bhv", new, q), 0)
        return (
            jnp.where(here, new, state),
            started | valid,
            jnp.where(valid, segment_ids, last),
        ), out

    @jax.checkpoint  # gradients keep a state every BLOCK tokens
    def block(carry, x):
        return jax.lax.scan(token, carry, x)

    size = max(1, min(length, BLOCK))
    over_time = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, valid, segment_ids)]
    # Rows are filled up with pads.
    over_time = [jnp.pad(x, [(0, -length % size)] + [(0, 0)] * (x.ndim - 1)) for x in over_time]
    start = (state, jnp.zeros(batch, bool), jnp.zeros(batch, segment_ids.dtype))
    with jax.default_matmul_precision("highest"):
        (state, _, _), out = jax.lax.scan(
            block, start, [x.reshape(-1, size, *x.shape[1:]) for x in over_time]
        )
    return jnp.moveaxis(out.reshape(-1, *out.shape[2:])[:length], 0, 1), state
