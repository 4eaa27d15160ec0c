"""Programs whose static score for TPU is recorded: functions with the shapes to compile them for,
by arguments that JSON can carry.

A kernel that is to be scored gets a builder here and a line in `benchmarks.tpu_scores`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta_rule import xla
from pallas_kernels.gated_delta_rule.chunk_layout import join_chunks
from pallas_kernels.gated_delta_rule.recurrent_state import last_state, start_in_float32
from pallas_kernels.gated_delta_rule.tpu import gated_delta_rule as delta_tpu
from pallas_kernels.gated_delta_rule.tpu.backward import backward
from pallas_kernels.gated_delta_rule.tpu.chunk_scan import chunk_scan
from pallas_kernels.gated_delta_rule.tpu.gates import ROWS
from pallas_kernels.gated_delta_rule.tpu.inverse import inverse
from pallas_kernels.gated_delta_rule.tuning import TPU as TPUDelta
from pallas_kernels.gated_delta_rule.tuning import XLA as XLADelta
from pallas_kernels.gated_delta_rule.xla_chunk_scan import chunk_scan as xla_chunk_scan
from pallas_kernels.gated_delta_rule.xla_chunk_scan import outputs
from pallas_kernels.gated_delta_rule.xla_chunks import prepare
from pallas_kernels.gated_delta_rule.xla_products import products_of
from pallas_kernels.projection import xla as xla_projection
from pallas_kernels.short_conv.tpu import short_conv as short_conv_tpu
from pallas_kernels.testing.cases.projection import PUBLISHED

f32, i32 = jnp.float32, jnp.int32


def gdn_kernels(
    *kernels: str,
    length: int = 8192,
    heads: int = 16,
    widths: tuple[int, int] = (128, 256),
    dtype: str = "bfloat16",
    save: bool = True,
) -> tuple[Callable, tuple]:
    """Kernels of the gated delta rule ("inverse", "chunk_scan", "backward") as they run for one
    sequence, each of them alone, in one program. save: also write what training needs."""
    size = delta_tpu.chunk_size(length)
    chunks, (key, value) = -(-length // size), widths

    def chunked(*shape, kind=dtype):
        return jax.ShapeDtypeStruct((chunks, 1, heads, *shape), kind)

    keys, values = (
        jax.ShapeDtypeStruct((1, chunks * size, heads * width), dtype) for width in widths
    )
    t, rows = chunked(size, size), chunked(ROWS, size, kind=f32)
    state = jax.ShapeDtypeStruct((1, heads, key, value), f32)
    block = delta_tpu.block_heads(heads, key, value, dtype)
    states = jax.ShapeDtypeStruct((-(-chunks // 2), 1, heads, key, value), dtype)
    parts = [t, t] if dtype == "bfloat16" else [t]
    known = {
        "inverse": (lambda *x: inverse(*x, block, save, False), (keys, rows)),
        "chunk_scan": (
            lambda *x: chunk_scan(*x, block, save, False),
            (keys, keys, values, t, rows, state),
        ),
        "backward": (
            lambda *x: backward(
                *x, delta_tpu.block_heads(heads, key, value, dtype, TPUDelta.backward), False
            ),
            (keys, keys, values, parts, rows, states, values, state),
        ),
    }
    functions, shapes = zip(*(known[kernel] for kernel in kernels), strict=True)
    return lambda *inputs: [
        function(*x) for function, x in zip(functions, inputs, strict=True)
    ], shapes


def conv_kernels(
    length: int = 8192, channels: int = 4096, dtype: str = "bfloat16"
) -> tuple[Callable, tuple]:
    """The short convolution of one packed sequence, forward and backward."""
    x, token = (
        jax.ShapeDtypeStruct((1, length, channels), dtype),
        jax.ShapeDtypeStruct((1, length), i32),
    )

    def both(x, weight, index, segment, ct):
        out, pull = jax.vjp(
            lambda *inputs: short_conv_tpu.short_conv(*inputs, None, index, segment)[0], x, weight
        )
        return out, pull(ct)

    return both, (x, jax.ShapeDtypeStruct((4, channels), dtype), token, token, x)


def gdn_op(
    implementation: str,
    gradient: bool,
    length: int = 8192,
    heads: int = 16,
    dtype: str = "bfloat16",
) -> tuple[Callable, tuple]:
    """The whole operator for one packed sequence, K 128 and V 256, with an initial state.

    implementation: "mosaic_tpu", "xla", or "scan_and_solve": xla's with the inverse by
        `solve_triangular`.
    gradient: also gradients in the first six arguments.
    """
    run = gdn_implementation(implementation)

    def both(*arguments):
        results, pull = jax.vjp(lambda *x: run(*x, *arguments[6:8]), *arguments[:6])
        return results, pull(arguments[8:])

    def tokens(*rest, kind=dtype):
        return jax.ShapeDtypeStruct((1, length, *rest), kind)

    state = jax.ShapeDtypeStruct((1, heads, 128, 256), f32)
    inputs = (
        tokens(heads, 128),
        tokens(heads, 128),
        tokens(heads, 256),
        tokens(heads, kind=f32),
        tokens(heads, kind=f32),
        state,
    )
    others = (tokens(kind=i32), tokens(kind=i32))
    return (
        (both, (*inputs, *others, tokens(heads, 256), state))
        if gradient
        else (run, (*inputs, *others))
    )


def gdn_implementation(implementation: str) -> Callable:
    """The gated delta rule, as `gdn_op` names implementations."""

    def scan_and_solve(q, k, v, g, beta, initial_state, index, segment):
        return _scan_and_solve(
            q, k, v, *start_in_float32(k, v, g, beta, initial_state), index, segment
        )

    return {
        "mosaic_tpu": delta_tpu.gated_delta_rule,
        "xla": xla.gated_delta_rule,
        "scan_and_solve": scan_and_solve,
    }[implementation]


@jax.custom_vjp
def _scan_and_solve(q, k, v, g, beta, initial_state, index, segment):
    return _scan_and_solve_forward(q, k, v, g, beta, initial_state, index, segment)[0]


def _scan_and_solve_forward(q, k, v, g, beta, initial_state, index, segment):
    def invert(a):
        eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
        return jax.scipy.linalg.solve_triangular(eye + a, eye, lower=True, unit_diagonal=True)

    products = products_of(q, k, v)
    chunks = prepare(q, k, v, g, beta, index, segment, products, XLADelta.chunk, invert)
    states, last = xla_chunk_scan(chunks, initial_state, products)
    out, _ = outputs(chunks, states, products)
    out = join_chunks(out.astype(v.dtype), k.shape[1])
    results = out, last_state(initial_state, last, index)
    return results, (q, k, v, g, beta, index, segment, chunks.inverse, states)


def _scan_and_solve_backward(kept, cts):
    return xla.backward(kept, cts, XLADelta.chunk)


_scan_and_solve.defvjp(_scan_and_solve_forward, _scan_and_solve_backward)


def projections(rows: int, *sizes: str) -> tuple[Callable, tuple]:
    """Products of `rows` rows with matrices of the published sizes (`cases.projection.PUBLISHED`)
    and the norm before them, by `xla`."""
    around = [PUBLISHED[size] for size in sizes]
    shapes = [
        (
            jax.ShapeDtypeStruct((rows, k), jnp.bfloat16),
            jax.ShapeDtypeStruct(
                (n, k) if more.get("transposed") else (k, *[2] * more.get("gated", 0), n),
                jnp.bfloat16,
            ),
            jax.ShapeDtypeStruct((k,), jnp.bfloat16),
        )
        for k, n, more in around
    ]

    def all_of_them(*given):
        return [
            xla_projection.projection(x, w, norm=norm, transposed=more.get("transposed", False))
            for (x, w, norm), (_, _, more) in zip(given, around, strict=True)
        ]

    return all_of_them, tuple(shapes)
