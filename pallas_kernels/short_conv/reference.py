"""Reference: the definition of the short convolution, token by token, in the precision of the
inputs."""

import jax
import jax.numpy as jnp

from pallas_kernels.columns import values


def short_conv(x, weight, conv_state=None, token_index=None, segment_ids=None):
    """The contract of `pallas_kernels.short_conv.short_conv`. Here pads may be anywhere."""
    x = values(x)
    batch, length, channels = x.shape
    valid = jnp.ones((batch, length), bool) if token_index is None else token_index >= 0
    segment_ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    conv_state = jnp.zeros((batch, 3, channels), x.dtype) if conv_state is None else conv_state

    def token(carry, now):
        conv_state, started, last = carry
        x, valid, segment_ids = now
        here = valid[:, None]
        reset = (valid & started & (segment_ids != last))[:, None, None]
        # [B, 4, C]
        seen = jnp.concatenate(
            [jnp.where(reset, 0, conv_state), jnp.where(here, x, 0)[:, None]], axis=1
        )
        out = jnp.where(here, jax.nn.silu(jnp.sum(seen * weight, axis=1)), 0)
        return (
            jnp.where(here[..., None], seen[:, 1:], conv_state),
            started | valid,
            jnp.where(valid, segment_ids, last),
        ), out

    start = (conv_state, jnp.zeros(batch, bool), jnp.zeros(batch, segment_ids.dtype))
    (conv_state, _, _), out = jax.lax.scan(
        token, start, [jnp.moveaxis(a, 1, 0) for a in (x, valid, segment_ids)]
    )
    return jnp.moveaxis(out, 0, 1), conv_state
