"""The causal convolution as four shifted multiply-adds that XLA fuses into one pass."""

import jax
import jax.numpy as jnp

from pallas_kernels.runs import sequence_runs

TAPS = 4


def causal_conv(
    x: jax.Array,
    weight: jax.Array,
    tail: jax.Array | None = None,
    index: jax.Array | None = None,
    segment: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`silu(sum_d weight[3 - d] * x[t - d])` for every channel, d = 0..3, with sums in float32.

    Args:
        x: [batch, length, channels].
        weight: [4, channels]; row 3 meets the current token.
        tail: [batch, 3, channels], the three inputs before this call, of the sequence that the first valid token
            continues; None is zeros.
        index: [batch, length] int, -1 marks a pad; None if there is none. Pads may end a row or stand between two
            sequences, not inside one or before the first.
        segment: [batch, length] int, sequence of each token. No tap reaches back over a change of segment.

    Returns:
        out [batch, length, channels] in x's dtype, zero at pads, and the new tail [batch, 3, channels] in x's dtype: the
        last three inputs of the last valid token's sequence, zeros where it has had fewer. A row without valid tokens
        returns its tail bit for bit. What pads hold (NaN included) reaches neither results nor gradients.

    Differentiable in x, weight and tail; the backward pass keeps the inputs alone.
    """
    if tail is None:
        tail = jnp.repeat(jnp.zeros_like(x[:, :1]), TAPS - 1, axis=1)  # zeros that are sharded as x is
    return _causal_conv(x, weight, tail.astype(x.dtype), index, segment)


def _compute(x, weight, tail, index, segment):
    length = x.shape[1]
    valid = None if index is None else index >= 0
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    if length == 1:
        # else XLA for GPU draws the projection that made x into the concatenation, as one serial dot product a channel (0.6 ms)
        x = jax.lax.optimization_barrier(x)
    inputs = jnp.concatenate([tail, x], axis=1)  # [B, 3 + T, C]
    run = None
    if segment is not None:  # the tail belongs to run 0
        run = jnp.pad(sequence_runs(index, segment), ((0, 0), (TAPS - 1, 0)))

    wide, weight = inputs.astype(jnp.float32), weight.astype(jnp.float32)
    total = 0.0
    for tap in range(TAPS):
        reach = wide[:, tap : tap + length] * weight[tap]
        if run is not None and tap < TAPS - 1:
            reach = jnp.where((run[:, tap : tap + length] == run[:, TAPS - 1 :])[..., None], reach, 0)
        total = total + reach
    out = jax.nn.silu(total).astype(x.dtype)
    if valid is not None:
        out = jnp.where(valid[..., None], out, 0)
    return out, _new_tail(inputs, valid, run)


def _new_tail(inputs, valid, run):
    """The last three valid rows of `inputs` (old tail, then new tokens), without those of an earlier sequence."""
    if valid is None:
        tail = inputs[:, -(TAPS - 1) :]
        kept = None if run is None else run[:, -(TAPS - 1) :]
    else:
        seen = jnp.pad(valid, ((0, 0), (TAPS - 1, 0)), constant_values=True).astype(jnp.int32)
        left = jnp.cumsum(seen[:, ::-1], axis=1)[:, ::-1]  # valid rows from here to the end
        wanted = jnp.arange(TAPS - 1, 0, -1)
        rows = (left[:, None, :] >= wanted[:, None]).sum(-1) - 1  # [B, 3]
        tail = jnp.take_along_axis(inputs, rows[..., None], axis=1)
        kept = None if run is None else jnp.take_along_axis(run, rows, axis=1)
    return tail if kept is None else jnp.where((kept == kept[:, -1:])[..., None], tail, 0)


@jax.custom_vjp
def _causal_conv(x, weight, tail, index, segment):
    return _compute(x, weight, tail, index, segment)


def _causal_conv_forward(x, weight, tail, index, segment):
    return _compute(x, weight, tail, index, segment), (x, weight, tail, index, segment)


def _causal_conv_backward(residuals, cts):
    # Autodiff alone would keep four float32 copies of x.
    x, weight, tail, index, segment = residuals
    _, pull = jax.vjp(lambda *inputs: _compute(*inputs, index, segment), x, weight, tail)
    return *pull(cts), None, None


_causal_conv.defvjp(_causal_conv_forward, _causal_conv_backward)
