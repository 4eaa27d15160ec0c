"""The short convolution on TPU, forward and backward, in Pallas.

Computes, for every channel and within the token's sequence, with d = 0..3 and s' the slope of silu
at the sum:

    out[t]     = silu(sum over d of w[3 - d] x[t - d])
    u[t]       = d_out[t] s'[t]
    d_w[3 - d] = sum over t of u[t] x[t - d]
    d_x[t]     = sum over d of w[3 - d] u[t + d]

Tiling: a grid step takes up to 512 tokens and 512 channels of one row. It takes 128 channels at a
time, so that values used together are computed together; it still spills registers (968 and 3,188
on v5e). In the forward pass, the tokens before a block are a second view of x: the block of 16 rows
that ends where the block begins. The backward pass takes the blocks from last to first. What the
tokens after a block contribute to its gradient is kept in vector memory. XLA computes four rows of
ones and zeros that say which taps reach a token of the same sequence.

Traffic, 2 bytes a number: forward x and out once, 0.33 ms on v5e for the 8,192 channels of a layer
and 8,192 tokens; backward x, d_out and d_x once, 0.49 ms. Floor: that. But v5e computes in 32-bit
numbers, about 40 operations forward and 80 backward for each.
"""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp

from pallas_kernels.columns import values
from pallas_kernels.segments import segment_numbers
from pallas_kernels.short_conv import xla
from pallas_kernels.short_conv.tuning import TPU as TPUShortConv
from pallas_kernels.short_conv.xla import TAPS

# Channels of a register; rows of the smallest block in bfloat16, and in float32.
LANES, BEFORE, AFTER = (128, 16, 8)
f32 = jnp.float32


def supports(
    x: jax.Array,
    weight: jax.Array,
    conv_state: jax.Array | None = None,
    token_index=None,
    segment_ids=None,
) -> str | None:
    """Returns the reason it does not take these arrays (or shapes with dtypes), else None."""
    _, length, channels = x.shape
    if x.dtype not in (jnp.bfloat16, f32):
        return f"dtype {x.dtype}: bfloat16 or float32"
    if channels % LANES:
        return f"{channels} channels: a multiple of {LANES}"
    if length < BEFORE:
        return f"rows of {length} tokens: at least {BEFORE}"
    return None


def short_conv(
    x: jax.Array,
    weight: jax.Array,
    conv_state: jax.Array | None = None,
    token_index: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    interpret=False,
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.short_conv.short_conv`.

    interpret: pltpu.InterpretParams runs the kernels without a TPU. Raises ValueError where
    `supports` gives a reason.
    """
    if reason := supports(x, weight):
        raise ValueError(
            f"short_conv on TPU does not take {reason}\n  -> use the implementation xla"
        )
    x = values(x)
    conv_state = xla.start(x, conv_state)
    length = x.shape[1]
    steps = -(-length // TPUShortConv.rows)
    step = BEFORE if steps == 1 else LANES
    rows = -(-length // (steps * step)) * step  # even shares
    beyond = [(0, 0), (0, -length % rows), (0, 0)]
    before = jnp.pad(conv_state, [(0, 0), (BEFORE - conv_state.shape[1], 0), (0, 0)])
    out = _convolve(
        jnp.pad(x, beyond),
        weight,
        before,
        _seen(token_index, segment_ids, x.shape[0], length, rows),
        rows,
        interpret,
    )
    return out[:, :length], xla.new_conv_state(x, conv_state, token_index, segment_ids)


def _seen(token_index, segment_ids, batch: int, length: int, rows: int) -> jax.Array:
    """[batch, 8, padded length] float32: row d is 1 where the token d before belongs to the same
    sequence, and 0 at pads."""
    valid = jnp.ones((batch, length), bool) if token_index is None else token_index >= 0
    segment = (
        jnp.zeros((batch, length), jnp.int32)
        if segment_ids is None
        else segment_numbers(token_index, segment_ids)
    )
    edge = [(0, 0), (TAPS - 1, 0)]  # conv_state belongs to segment 0
    segment, valid = jnp.pad(segment, edge), jnp.pad(valid, edge, constant_values=True)
    # Of the token d before.
    segments, valids = (
        [x[:, TAPS - 1 - d :][:, :length] for d in range(TAPS)] for x in (segment, valid)
    )
    taps = [(segments[d] == segments[0]) & valids[d] & valids[0] for d in range(TAPS)]
    return jnp.pad(
        jnp.stack(taps, axis=1).astype(f32), [(0, 0), (0, 8 - TAPS), (0, -length % rows)]
    )


def _reaches(x_ref, past_ref, before_ref, seen, at, first):
    """The input of each tap for every token of a block, [rows, LANES] float32 each, 0 beyond the
    token's sequence."""
    past = jnp.where(first, before_ref[:, at], past_ref[:, at]).astype(f32)
    inputs = jnp.concatenate([past, x_ref[:, at].astype(f32)])
    shifted = [inputs if d == 0 else pltpu.roll(inputs, d, axis=0) for d in range(TAPS)]
    return [jnp.where(seen[d], y[BEFORE:], 0.0) for d, y in enumerate(shifted)]


def _flags(seen_ref) -> list:
    columns = seen_ref[...].T
    return [columns[:, d : d + 1] > 0 for d in range(TAPS)]


def _specs(x, rows: int, backwards: bool):
    """The grid, and the blocks of x, of the rows before them, of weights, of conv_state and of
    `_seen`."""
    batch, length, channels = x.shape
    lanes = max(n for n in range(LANES, TPUShortConv.lanes + 1, LANES) if channels % n == 0)
    steps = length // rows
    place = (lambda n: steps - 1 - n) if backwards else (lambda n: n)
    tokens = pl.BlockSpec((None, rows, lanes), lambda b, c, n: (b, place(n), c))
    past = pl.BlockSpec(
        (None, BEFORE, lanes),
        lambda b, c, n: (b, jnp.maximum(place(n) * (rows // BEFORE) - 1, 0), c),
    )
    weights = pl.BlockSpec((TAPS, lanes), lambda b, c, n: (0, c))
    conv_state = pl.BlockSpec((None, BEFORE, lanes), lambda b, c, n: (b, 0, c))
    seen = pl.BlockSpec((None, 8, rows), lambda b, c, n: (b, 0, place(n)))
    return (batch, channels // lanes, steps), lanes, tokens, past, weights, conv_state, seen


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _convolve(x, weight, before, seen, rows, interpret):
    grid, lanes, tokens, past, weights, conv_state, flags = _specs(x, rows, False)

    def kernel(x_ref, past_ref, weight_ref, before_ref, seen_ref, out_ref):
        seen, first = _flags(seen_ref), pl.program_id(2) == 0
        for lane in range(0, lanes, LANES):
            at = pl.ds(lane, LANES)
            reaches = _reaches(x_ref, past_ref, before_ref, seen, at, first)
            total = sum(
                y * weight_ref[TAPS - 1 - d : TAPS - d, at].astype(f32)
                for d, y in enumerate(reaches)
            )
            out_ref[:, at] = jnp.where(seen[0], total * jax.nn.sigmoid(total), 0.0).astype(x.dtype)

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[tokens, past, weights, conv_state, flags],
        out_specs=tokens,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret,
        name="short_conv",
    )(x, x, weight, before, seen)


def _forward(x, weight, before, seen, rows, interpret):
    return _convolve(x, weight, before, seen, rows, interpret), (x, weight, before, seen)


def _backward(rows, interpret, kept, d_out):
    x, weight, before, seen = kept
    grid, lanes, tokens, past, weights, conv_state, flags = _specs(x, rows, True)
    batch, _, channels = x.shape

    def kernel(
        x_ref,
        past_ref,
        weight_ref,
        before_ref,
        seen_ref,
        d_out_ref,
        d_x_ref,
        d_weight_ref,
        d_before_ref,
        after_ref,
    ):
        step = pl.program_id(2)
        seen, first = _flags(seen_ref), step == pl.num_programs(2) - 1

        @pl.when(step == 0)
        def _():
            d_weight_ref[...] = jnp.zeros_like(d_weight_ref)
            after_ref[...] = jnp.zeros_like(after_ref)

        for lane in range(0, lanes, LANES):
            at = pl.ds(lane, LANES)
            reaches = _reaches(x_ref, past_ref, before_ref, seen, at, first)
            taps = [weight_ref[TAPS - 1 - d : TAPS - d, at].astype(f32) for d in range(TAPS)]
            total = sum(y * w for y, w in zip(reaches, taps, strict=True))
            gate = jax.nn.sigmoid(total)
            d_total = jnp.where(seen[0], d_out_ref[:, at].astype(f32), 0.0) * (
                gate * (1 + total * (1 - gate))
            )
            d_x, d_past = jnp.zeros((rows, LANES), f32), jnp.zeros((AFTER, LANES), f32)
            for d in range(TAPS):
                d_weight_ref[TAPS - 1 - d : TAPS - d, at] += jnp.sum(
                    d_total * reaches[d], axis=0, keepdims=True
                )
                back = jnp.where(seen[d], d_total, 0.0) * taps[d]
                d_x += _ahead(jnp.concatenate([back, after_ref[d, :, at]]), d)[:rows]
                d_past += _ahead(
                    jnp.concatenate([jnp.zeros((AFTER, LANES), f32), back[:AFTER]]), d
                )[:AFTER]
                after_ref[d, :, at] = back[:AFTER]
            d_x_ref[:, at] = d_x.astype(x.dtype)
            d_before_ref[:, at] = d_past  # what the first block leaves stays

    edge = pl.BlockSpec((None, AFTER, lanes), lambda b, c, n: (b, 0, c))
    d_x, d_weight, d_before = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[tokens, past, weights, conv_state, flags, tokens],
        out_specs=[tokens, edge, edge],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            *[jax.ShapeDtypeStruct((batch, AFTER, channels), f32)] * 2,
        ],
        scratch_shapes=[pltpu.VMEM((TAPS, AFTER, lanes), f32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="causal_conv_backward",
    )(x, x, weight, before, seen, d_out)
    d_before = jnp.pad(d_before, [(0, 0), (BEFORE - AFTER, 0), (0, 0)]).astype(before.dtype)
    return d_x, d_weight[:, :TAPS].sum(0).astype(weight.dtype), d_before, jnp.zeros_like(seen)


def _ahead(x, d: int):
    """Row t is row t + d of x."""
    return x if d == 0 else pltpu.roll(x, x.shape[0] - d, axis=0)


_convolve.defvjp(_forward, _backward)
