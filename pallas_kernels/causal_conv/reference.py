"""The causal convolution as it is defined, one token after the other, in whatever precision the inputs have."""

import jax
import jax.numpy as jnp


def causal_conv(x, weight, tail=None, index=None, segment=None):
    """Same arguments and results as the public function; here pads may stand anywhere."""
    batch, length, channels = x.shape
    valid = jnp.ones((batch, length), bool) if index is None else index >= 0
    segment = jnp.zeros((batch, length), jnp.int32) if segment is None else segment
    tail = jnp.zeros((batch, 3, channels), x.dtype) if tail is None else tail

    def token(carry, now):
        tail, started, last = carry
        x, valid, segment = now
        here = valid[:, None]
        reset = (valid & started & (segment != last))[:, None, None]
        seen = jnp.concatenate([jnp.where(reset, 0, tail), jnp.where(here, x, 0)[:, None]], axis=1)  # [B, 4, C]
        out = jnp.where(here, jax.nn.silu(jnp.sum(seen * weight, axis=1)), 0)
        return (jnp.where(here[..., None], seen[:, 1:], tail), started | valid, jnp.where(valid, segment, last)), out

    start = (tail, jnp.zeros(batch, bool), jnp.zeros(batch, segment.dtype))
    (tail, _, _), out = jax.lax.scan(token, start, [jnp.moveaxis(a, 1, 0) for a in (x, valid, segment)])
    return jnp.moveaxis(out, 0, 1), tail
