"""Attention on TPUs, by Pallas kernels that visit only pairs of blocks in which some query sees
some key.

plan.py turns order, windows, segments and pads into ranges of numbers and a list of block pairs.
The kernels take only these. Operands are rows of tokens with the heads side by side, 128 lanes
each. For heads 128 wide this is the memory layout of [B, T, H, D]; narrower heads are padded with
zeros.

There are three kernels: output (forward.py), gradient of the queries (backward_queries.py),
gradients of keys and values (backward_keys.py). Static scores: benchmarks/tpu_scores.py.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.api import complete
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.tpu.backward_keys import backward_keys
from pallas_kernels.attention.tpu.backward_queries import backward_queries
from pallas_kernels.attention.tpu.forward import LANES, forward
from pallas_kernels.attention.tpu.plan import BLIND, NOBODY, Reach, has_diagonal, reach, visits
from pallas_kernels.attention.tuning import TPU as TPUAttention
from pallas_kernels.attention.tuning import Block

MOST_VISITS = 1 << 16  # pairs of blocks: the list is in scalar memory, 8 bytes each


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Block sizes of the three kernels."""

    forward: Block
    queries: Block
    keys: Block


def tuned(q_length: int, k_length: int, mask: Mask, dtype) -> Tuning:
    """The block sizes for a case, by tuning.py."""
    window = mask.window if mask.aligned and not mask.sinks else None
    block = TPUAttention.narrow if window is not None and window <= LANES else TPUAttention.wide

    def share(length, most):
        """Even shares of at most `most` rows, that fill registers."""
        if window is not None and window > LANES:
            # Larger blocks would mostly hold keys outside the window.
            most = min(most, max(TPUAttention.least, up(window // 2, LANES)))
        return up(-(-length // -(-length // most)), LANES)

    # As many bytes in each dtype.
    rows, keys = (
        max(LANES, most * 2 // jnp.dtype(dtype).itemsize) for most in (block.rows, block.keys)
    )
    block = Block(share(q_length, rows), share(k_length, keys), block.heads)
    return Tuning(block, block, block)


def up(length: int, step: int) -> int:
    return -(-length // step) * step


def supports(
    q: jax.Array, k: jax.Array, v: jax.Array, *__, mask: Mask, tuning: Tuning | None = None, **_
) -> str | None:
    """Returns the reason it does not take these arrays (or shapes with dtypes), else None."""
    if any(x.dtype != q.dtype for x in (k, v)) or q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"dtypes {q.dtype}, {k.dtype} and {v.dtype}: all bfloat16 or all float32"
    if max(q.shape[3], v.shape[3]) > LANES:
        return f"head widths {q.shape[3]} and {v.shape[3]}: up to {LANES}"
    if not all(math.prod(x.shape) for x in (q, k, v)):
        return "no tokens"
    tuning = tuning or tuned(q.shape[1], k.shape[1], mask, q.dtype)
    for block in (tuning.forward, tuning.queries, tuning.keys):
        pairs = q.shape[0] * -(-q.shape[1] // block.rows) * -(-k.shape[1] // block.keys)
        if mask.aligned and mask.window is not None and not mask.sinks:
            across = -(-mask.window // block.keys) + -(-block.rows // block.keys) + 1
            pairs = min(
                pairs,
                q.shape[0] * -(-q.shape[1] // block.rows) * (across if mask.causal else 2 * across),
            )
        if pairs > MOST_VISITS:
            return f"{pairs} pairs of a query block and a key block: up to {MOST_VISITS}"
    return None


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_token_index: jax.Array | None = None,
    k_token_index: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    k_segment_ids: jax.Array | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    *,
    interpret: pltpu.InterpretParams | None = None,
    tuning: Tuning | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.attention.attention`.

    interpret: run the kernels in the TPU interpreter, on any machine; None compiles them for a TPU.
    tuning: block sizes of the kernels, if not those of tuning.py; rows and keys are multiples of
    128. Raises ValueError where `complete` does or `supports` gives a reason.
    """
    call = complete(
        q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale
    )
    if reason := supports(**call._asdict(), tuning=tuning):
        raise ValueError(
            f"attention on TPU does not take {reason}\n  -> use the implementation xla"
        )
    tuning = tuning or tuned(q.shape[1], k.shape[1], call.mask, q.dtype)
    return _attention(*call[:7], Static(call.mask, call.scale, interpret, tuning))


@dataclasses.dataclass(frozen=True)
class Static:
    """What is known when a program is traced."""

    mask: Mask
    scale: float
    interpret: pltpu.InterpretParams | None
    tuning: Tuning


@partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, static):
    return _forward(q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, static)[0]


def _forward(q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, static):
    block = static.tuning.forward
    who = reach(q_token_index, k_token_index, q_segment_ids, k_segment_ids, static.mask)
    who, options = kernel_call(q, k, who, block, static)
    rows = (
        _rows(q, block.rows),
        _rows(_erase(k, k_token_index), block.keys),
        _rows(_erase(v, k_token_index), block.keys),
    )
    visited = visits(who, static.mask, block.rows, block.keys)
    out, lse = forward(*rows, _columns(*who[:3]), _columns(*who[3:]).T, visited, **options)
    out = _tokens(out, q.shape[:3] + v.shape[3:])
    lse = lse.reshape(q.shape[2], q.shape[0], -1)[:, :, : q.shape[1]].transpose(1, 2, 0)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (
        q,
        k,
        v,
        q_token_index,
        k_token_index,
        q_segment_ids,
        k_segment_ids,
        out,
        lse,
    )


def _backward(static, kept, cotangents):
    q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, out, lse = kept
    d_out, d_lse = cotangents
    # Queries that saw no key have no gradient, whatever their rows hold.
    live = lse != -jnp.inf
    d_out = jnp.where(live[..., None], d_out, 0)
    shift = jnp.where(live, jnp.sum(d_out.astype(jnp.float32) * out, axis=-1) - d_lse, 0)
    # For the others, this lse makes all weights exp2(score - lse) 0.
    lse = jnp.where(live, lse * math.log2(math.e), -jnp.finfo(jnp.float32).min)
    q, k, v = _erase(q, q_token_index), _erase(k, k_token_index), _erase(v, k_token_index)
    everyone = reach(q_token_index, k_token_index, q_segment_ids, k_segment_ids, static.mask)

    def arguments(block):
        who, options = kernel_call(q, k, everyone, block, static)
        rows = (
            _rows(q, block.rows),
            _rows(k, block.keys),
            _rows(v, block.keys),
            _rows(d_out, block.rows),
        )
        numbers = (
            _pad(x, block.rows, 0).transpose(2, 0, 1).reshape(q.shape[2], -1) for x in (lse, shift)
        )
        return (*rows, *numbers), _columns(*who[:3]), _columns(*who[3:]), who, options

    block = static.tuning.queries
    arrays, ranges, numbers, who, options = arguments(block)
    visited = visits(who, static.mask, block.rows, block.keys)
    d_q = _tokens(backward_queries(*arrays, ranges, numbers.T, visited, **options), q.shape)
    block = static.tuning.keys
    arrays, ranges, numbers, who, options = arguments(block)
    visited = visits(who, static.mask, block.rows, block.keys, by_key=True)
    d_k, d_v = backward_keys(*arrays, ranges.T, numbers, visited, **options)
    return d_q, _tokens(d_k, k.shape), _tokens(d_v, v.shape), None, None, None, None


_attention.defvjp(_forward, _backward)


def kernel_call(q, k, who: Reach, block: Block, static: Static):
    """The reach of padded rows, and the keyword arguments of the kernels."""
    fills = (0, BLIND, 0, NOBODY, 0)
    steps = (block.rows,) * 3 + (block.keys,) * 2
    who = Reach(
        *(
            x if x is None else _pad(x, n, fill)
            for x, n, fill in zip(who, steps, fills, strict=True)
        )
    )
    groups = q.shape[2] // k.shape[2]
    if groups >= block.heads:
        heads = _divisor(groups, block.heads), 1
    else:
        k_heads = _divisor(k.shape[2], block.heads // groups)
        heads = k_heads * groups, k_heads
    return who, {
        "heads": heads,
        "blocks": (block.rows, block.keys),
        "groups": groups,
        "scale": static.scale,
        "sinks": static.mask.sinks if static.mask.window is not None else 0,
        "segments": who.q_segment_ids is not None,
        "diagonal": has_diagonal(static.mask, block.rows, block.keys),
        "interpret": static.interpret,
    }


def _divisor(n: int, most: int) -> int:
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)


def _erase(x: jax.Array, token_index: jax.Array) -> jax.Array:
    """Zeros in the rows of pads: a weight of 0 does not remove a NaN."""
    return jnp.where(token_index[:, :, None, None] >= 0, x, 0)


def _pad(x: jax.Array, step: int, fill: int) -> jax.Array:
    """Axis 1 filled up to a multiple of `step`."""
    widths = [(0, 0), (0, -x.shape[1] % step)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, constant_values=fill)


def _rows(x: jax.Array, step: int) -> jax.Array:
    """[B, T, H, D] -> [B * padded T, H * 128]"""
    x = jnp.pad(_pad(x, step, 0), [(0, 0)] * 3 + [(0, LANES - x.shape[3])])
    return x.reshape(-1, x.shape[2] * LANES)


def _tokens(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Back: [B * padded T, H * 128] -> [B, T, H, D]"""
    batch, length, heads, width = shape
    return x.reshape(batch, -1, heads, LANES)[:, :length, :, :width]


def _columns(*numbers: jax.Array | None) -> jax.Array:
    """[B, T] each, or None -> [B * T, 8] int32"""
    shape = numbers[0].shape
    columns = [
        jnp.zeros(shape, jnp.int32) if x is None else jnp.broadcast_to(x, shape).astype(jnp.int32)
        for x in numbers
    ]
    columns += [jnp.zeros(shape, jnp.int32)] * (8 - len(columns))
    return jnp.stack(columns, axis=-1).reshape(-1, 8)
