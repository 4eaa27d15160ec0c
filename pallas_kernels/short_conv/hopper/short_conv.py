"""The short convolution on Hopper GPUs, forward, in Pallas Mosaic GPU. The backward pass is that of
`pallas_kernels.short_conv.xla`.

Tiling: a thread block takes 16 tokens of one sequence and up to 512 channels, four a thread. All
loads, three rows before the block among them, are asked for first. XLA computes for each token how
many tokens before it belong to its sequence, up to three; -1 marks a pad. The same number holds for
all channels, so that a tap costs a selection and a multiply-add.

Traffic: x and out once, 2 bytes a number each; the rows before a block come from the cache. Floor:
88 us for the 8,192 channels of a layer and 8,192 tokens at 3.04 TB/s. XLA's own fusion takes
290 us: it addresses each tap of each number by itself.
"""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels.columns import Columns, values
from pallas_kernels.mosaic_gpu import load
from pallas_kernels.segments import segment_numbers
from pallas_kernels.short_conv import xla
from pallas_kernels.short_conv.xla import TAPS

ROWS = 16  # tokens of a thread block
BLOCKS = 512, 256, 128  # channels of a thread block: the largest that divides them
THREADS = 128
VECTOR = BLOCKS[0] // THREADS  # numbers that a thread loads at once, at a multiple of their size
EDGE = TAPS - 1

f32 = jnp.float32


def supports(x, weight, conv_state=None, token_index=None, segment_ids=None) -> str | None:
    """Returns the reason it does not take these arrays (or shapes with dtypes), else None."""
    _, length, channels = x.shape
    if x.dtype != jnp.bfloat16:
        return f"dtype {x.dtype}: bfloat16 only"
    if channels % BLOCKS[-1]:
        return f"{channels} channels: a multiple of {BLOCKS[-1]}"
    if isinstance(x, Columns) and not x.aligned(VECTOR):
        return f"columns of rows that do not begin at multiples of {VECTOR}"
    if length < TAPS:
        return f"rows of {length} tokens: at least {TAPS}"
    return None


def short_conv(
    x: jax.Array | Columns,
    weight: jax.Array,
    conv_state: jax.Array | None = None,
    token_index: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.short_conv.short_conv`, with gradients by `xla.backward`.

    Raises ValueError where `supports` gives a reason.
    """
    if reason := supports(x, weight):
        raise ValueError(
            f"short_conv on Hopper does not take {reason}\n  -> use the implementation xla"
        )
    return _short_conv(x, weight, xla.start(values(x), conv_state), token_index, segment_ids)


def _compute(x, weight, conv_state, token_index, segment_ids):
    whole, first = (x.array, x.start) if isinstance(x, Columns) else (x, 0)
    reach = reaches(x.shape[:2], token_index, segment_ids)
    out = forward(whole, weight, conv_state, reach, first)
    return out, xla.new_conv_state(values(x), conv_state, token_index, segment_ids)


def reaches(shape: tuple[int, int], token_index, segment_ids) -> jax.Array:
    """[batch, length] int32: how many inputs before each token are of its sequence, at most three;
    -1 at pads."""
    reach = jnp.full(shape, EDGE, jnp.int32)
    if segment_ids is not None:
        # inputs before this call belong to the first sequence
        number = jnp.pad(segment_numbers(token_index, segment_ids), ((0, 0), (EDGE, 0)))
        own = number[:, EDGE:]
        same = [number[:, EDGE - back : EDGE - back + shape[1]] == own for back in (1, 2, 3)]
        reach = sum(x.astype(jnp.int32) for x in same)
    return reach if token_index is None else jnp.where(token_index >= 0, reach, -1)


@partial(jax.jit, static_argnames="first")  # a model's layers share one compiled kernel
def forward(
    x: jax.Array, weight: jax.Array, conv_state: jax.Array, reach: jax.Array, first: int
) -> jax.Array:
    """out [batch, length, channels] of the columns of x from `first` on.

    x: [batch, length, columns]; weight: [4, channels]; conv_state: [batch, 3, channels]; reach:
        [batch, length] int32, of `reaches`.
    """
    batch, length, _ = x.shape
    channels = weight.shape[1]
    width = next(n for n in BLOCKS if channels % n == 0)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // THREADS)

    def kernel(x_ref, weight_ref, state_ref, reach_ref, out_ref):
        b, tile, block = (jax.lax.axis_index(name) for name in ("batch", "tile", "block"))
        start, own = tile * ROWS, pl.ds(block * width, width)
        columns = pl.ds(first + block * width, width)

        def token(t):
            return jnp.clip(t, 0, length - 1)

        def row(t):
            return load(x_ref.at[b, token(t), columns], layout)

        def number(n):
            return plgpu.layout_cast(jnp.broadcast_to(n, (width,)), layout)

        before = [
            (row(start - back), load(state_ref.at[b, EDGE - back, own], layout))
            for back in (3, 2, 1)
        ]
        rows = [row(start + i) for i in range(ROWS)]
        taps = [load(weight_ref.at[tap, own], layout) for tap in range(TAPS)]
        counts = [reach_ref[b, token(start + i)] for i in range(ROWS)]
        at_start = number(tile) == 0
        rows = [jnp.where(at_start, state, x) for x, state in before] + rows
        rows, taps = [x.astype(f32) for x in rows], [w.astype(f32) for w in taps]
        for i in range(ROWS):
            count, total = number(counts[i]), rows[EDGE + i] * taps[EDGE]
            for back in (1, 2, 3):
                seen = jnp.where(count >= back, rows[EDGE + i - back], 0.0)
                total = total + seen * taps[EDGE - back]
            y = jnp.where(count >= 0, total / (1 + jnp.exp(-total)), 0.0)

            @pl.when(start + i < length)
            def _(i=i, y=y):
                out_ref[b, start + i, own] = y.astype(out_ref.dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, length, channels), x.dtype),
        grid=(batch, -(-length // ROWS), channels // width),
        grid_names=("batch", "tile", "block"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="short_conv",
    )(x, weight, conv_state, reach)


@jax.custom_vjp
def _short_conv(x, weight, conv_state, token_index, segment_ids):
    return _compute(x, weight, conv_state, token_index, segment_ids)


def _forward(*arrays):
    return _compute(*arrays), arrays


def _backward(arrays, cotangents):
    x, *others = arrays
    d_x, *rest = xla.backward((values(x), *others), cotangents)
    if isinstance(x, Columns):
        after = x.array.shape[-1] - x.start - x.width
        padding = [(0, 0)] * (d_x.ndim - 1) + [(x.start, after)]
        d_x = Columns(jnp.pad(d_x, padding), x.start, x.width)
    return d_x, *rest


_short_conv.defvjp(_forward, _backward)
