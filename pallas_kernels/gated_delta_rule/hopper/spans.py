"""Cuts a sequence into spans that are scanned in parallel, where few heads and rows would leave
multiprocessors of a Hopper GPU idle.

A span maps the state S to A S + B. B is the result from S = 0; A comes from running the 128 columns
of the identity with V = 0. span_transitions.py computes both for all spans in parallel; for the
first span, whose start is known, it computes the state itself. `compose` then gives the state
before each span, and all spans are scanned again, with outputs. The backward scan is cut likewise,
with spans counted from the last.

Measured on an H100, 8,192 tokens, K 128, V 256, forward: 16 heads in two spans 0.350 -> 0.329 ms; 8
heads in four 0.204, 4 in six 0.164, 2 in eight 0.126 (benchmarks/results/gated_delta_rule.jsonl).
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.tuning import HopperSpans as Tuning
from pallas_kernels.hardware import HOPPER_MULTIPROCESSORS

WIDTH = 64  # columns of a state that a thread block carries
KEY = 128  # width of keys, and so columns of the identity


def spans_of(rows: int, parts: int, count: int, back: bool = False) -> int:
    """The number of spans for rows of `count` chunks, for the scan or the backward scan.

    rows: batch x heads. parts: thread blocks of each row.
    """
    fewest = 2 if count <= Tuning.two and not back else 3

    def blocks(spans):
        return rows * max(spans * parts, transition_blocks(spans, parts))

    numbers = range(fewest, Tuning.most + 1) if count >= Tuning.row else ()
    spans = max(
        (
            n
            for n in numbers
            if blocks(n) <= HOPPER_MULTIPROCESSORS and n * Tuning.shortest <= count
        ),
        default=1,
    )
    return -(-count // -(-count // spans))  # no span is empty


def cut(count: int, spans: int, span) -> tuple:
    """The first chunk of a span and its number of chunks. All spans have as many, except that the
    last may have fewer."""
    each = -(-count // spans)
    assert (spans - 1) * each < count, "an empty span"
    first = span * each
    return first, each if each * spans == count else jnp.minimum(each, count - first)


def transition_blocks(spans: int, parts: int) -> int:
    """Thread blocks of one head that scan all spans but the last one."""
    return parts + (spans - 2) * (parts + KEY // WIDTH)


def place(block, parts: int) -> tuple:
    """The span (counted from where the scan begins) and the columns that a thread block scans.
    Columns `parts` and up are those of the identity."""
    rest = block - parts
    later = rest >= 0
    span = jnp.where(later, 1 + lax.div(rest, parts + KEY // WIDTH), 0)
    return span, jnp.where(later, lax.rem(rest, parts + KEY // WIDTH), block)


def compose(first: jax.Array, transitions: jax.Array) -> jax.Array:
    """The state before each span, [B, H, S, 128, V] float32: the composition of the transitions.

    first: [B, H, 128, V], the state before the first span.
    transitions: [B, H, S - 1, 128, V + 128], of all spans but the last: for the first span the
        state after it, for the others B and A side by side.
    """
    width = first.shape[3]
    states = [first, transitions[:, :, 0, :, :width]]
    for span in range(1, transitions.shape[2]):
        b, a = transitions[:, :, span, :, :width], transitions[:, :, span, :, width:]
        states.append(b + jnp.matmul(a, states[-1], precision=lax.Precision.HIGHEST))
    return jnp.stack(states, axis=2)
