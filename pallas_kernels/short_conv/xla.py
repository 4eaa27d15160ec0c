"""The short convolution as four shifted multiply-adds that XLA fuses into one pass."""

import jax
import jax.numpy as jnp

from pallas_kernels.columns import values
from pallas_kernels.segments import segment_numbers

TAPS = 4


def short_conv(
    x: jax.Array,
    weight: jax.Array,
    conv_state: jax.Array | None = None,
    token_index: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.short_conv.short_conv`."""
    x = values(x)
    return _short_conv(x, weight, start(x, conv_state), token_index, segment_ids)


def start(x, conv_state):
    """The inputs before this call, [B, 3, C] in x's dtype."""
    if conv_state is None:
        # Zeros made from x, so that they are sharded as x is.
        return jnp.repeat(jnp.zeros_like(x[:, :1]), TAPS - 1, axis=1)
    return conv_state.astype(x.dtype)


def new_conv_state(x, conv_state, token_index, segment_ids):
    """The inputs before the next call, [B, 3, C]."""
    x, valid, segment = _clean(x, token_index, segment_ids)
    rows = _state_rows(x.shape[:2], valid)
    new = jnp.take_along_axis(x, jnp.maximum(rows - TAPS + 1, 0)[..., None], axis=1)
    old = jnp.take_along_axis(conv_state, jnp.minimum(rows, TAPS - 2)[..., None], axis=1)
    last = jnp.where((rows < TAPS - 1)[..., None], old, new)
    return jnp.where(_in_last_segment(segment, rows), last, 0)


def _clean(x, token_index, segment_ids):
    """x with zeros at pads, which tokens are valid [B, T], and the segment number of each row of
    conv_state and of each token [B, 3 + T]."""
    valid = None if token_index is None else token_index >= 0
    if valid is not None:
        x = jnp.where(valid[..., None], x, 0)
    if x.shape[1] == 1:
        # Otherwise XLA for GPU fuses the projection that made x into this, as a serial dot product
        # for each channel (0.6 ms).
        x = jax.lax.optimization_barrier(x)
    segment = None
    if segment_ids is not None:  # conv_state belongs to segment 0
        segment = jnp.pad(segment_numbers(token_index, segment_ids), ((0, 0), (TAPS - 1, 0)))
    return x, valid, segment


def _reaches(x, conv_state, segment):
    """The input of each tap for every token, f32 [B, T, C], zero beyond the token's sequence.

    Shifts by padding fuse with what uses them. conv_state and x in one array would be copied, and
    on a GPU transposed on the way.
    """
    length = x.shape[1]
    token = jnp.arange(length)[:, None]
    for tap in range(TAPS):
        back, seen = TAPS - 1 - tap, x
        if back:
            before = _shift(conv_state[:, tap:], 0, length - back)
            seen = jnp.where(token < back, before, _shift(x, back, -back))
        seen = seen.astype(jnp.float32)
        if segment is not None and back:
            own = segment[:, tap : tap + length] == segment[:, TAPS - 1 :]
            seen = jnp.where(own[..., None], seen, 0)
        yield seen


def _shift(x, first, last):
    """Zeros before and after the rows of x; negative: so many rows are cut off."""
    zero = jnp.zeros((), x.dtype)
    return jax.lax.pad(x, zero, ((0, 0, 0), (first, last, 0), (0, 0, 0)))


def _compute(x, weight, conv_state, token_index, segment_ids):
    new = new_conv_state(x, conv_state, token_index, segment_ids)
    x, valid, segment = _clean(x, token_index, segment_ids)
    reaches = _reaches(x, conv_state, segment)
    total = sum(seen * w for seen, w in zip(reaches, weight.astype(jnp.float32), strict=True))
    out = jax.nn.silu(total).astype(x.dtype)
    if valid is not None:
        out = jnp.where(valid[..., None], out, 0)
    return out, new


def _state_rows(shape, valid):
    """Which inputs [B, 3] are the new conv_state: the last three of the old conv_state and the
    valid tokens. shape: [B, T]."""
    batch, length = shape
    if valid is None:
        return jnp.broadcast_to(jnp.arange(length, length + TAPS - 1), (batch, TAPS - 1))
    seen = jnp.pad(valid, ((0, 0), (TAPS - 1, 0)), constant_values=True).astype(jnp.int32)
    left = jnp.cumsum(seen[:, ::-1], axis=1)[:, ::-1]  # valid rows from here to the end
    return (left[:, None, :] >= jnp.arange(TAPS - 1, 0, -1)[:, None]).sum(-1) - 1


def _in_last_segment(segment, rows):
    """[B, 3, 1] or True: whether a row of the new conv_state belongs to the last token's sequence.
    The others become zero."""
    if segment is None:
        return True
    kept = jnp.take_along_axis(segment, rows, axis=1)
    return (kept == kept[:, -1:])[..., None]


@jax.custom_vjp
def _short_conv(x, weight, conv_state, token_index, segment_ids):
    return _compute(x, weight, conv_state, token_index, segment_ids)


def _short_conv_forward(x, weight, conv_state, token_index, segment_ids):
    return _compute(x, weight, conv_state, token_index, segment_ids), (
        x,
        weight,
        conv_state,
        token_index,
        segment_ids,
    )


def backward(residuals, cts):
    """Written by hand: autodiff would keep four float32 copies of x and scatter the gradient of the
    new conv_state into zeros as large as x."""
    x, weight, conv_state, token_index, segment_ids = residuals
    d_out, d_new_state = cts
    x, valid, segment = _clean(x, token_index, segment_ids)
    wide = weight.astype(jnp.float32)
    reaches = list(_reaches(x, conv_state, segment))
    total = sum(seen * w for seen, w in zip(reaches, wide, strict=True))
    gate = jax.nn.sigmoid(total)
    slope = gate * (1 + total * (1 - gate))
    if valid is not None:
        d_out = jnp.where(valid[..., None], d_out, 0)
    d_total = d_out.astype(jnp.float32) * slope
    d_weight = jnp.stack([jnp.sum(d_total * seen, axis=(0, 1)) for seen in reaches]).astype(
        weight.dtype
    )

    # The token `TAPS - 1 - tap` after an input read it through that tap.
    edge = TAPS - 1
    count = edge + x.shape[1]
    later = jnp.pad(d_total, ((0, 0), (edge, edge), (0, 0)))
    later_segment = (
        None if segment is None else jnp.pad(segment, ((0, 0), (0, edge)), constant_values=-1)
    )
    d_inputs = 0.0
    for tap in range(TAPS):
        back = later[:, edge - tap : edge - tap + count] * wide[tap]
        if segment is not None and tap < edge:
            back = jnp.where(
                (later_segment[:, edge - tap : edge - tap + count] == segment)[..., None], back, 0
            )
        d_inputs = d_inputs + back
    rows = _state_rows(x.shape[:2], valid)
    d_new_state = jnp.where(_in_last_segment(segment, rows), d_new_state, 0).astype(jnp.float32)
    for row, part in zip(jnp.moveaxis(rows, 1, 0), jnp.moveaxis(d_new_state, 1, 0), strict=True):
        d_inputs += jnp.where((jnp.arange(count) == row[:, None])[..., None], part[:, None], 0)
    d_inputs = d_inputs.astype(x.dtype)
    d_x = d_inputs[:, edge:]
    if valid is not None:
        d_x = jnp.where(valid[..., None], d_x, 0)
    return d_x, d_weight, d_inputs[:, :edge], None, None


_short_conv.defvjp(_short_conv_forward, backward)
