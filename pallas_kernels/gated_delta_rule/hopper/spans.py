"""How a sequence is cut into spans that walk at the same time, where one walk would leave a Hopper GPU idle: few heads, few rows.

Walked from zeros, a span of chunks leaves B; the 128 columns of the identity, walked through it without values, leave A; and from any
state S it leaves A S + B. A kernel finds these for all spans at once (of the first to be walked, that starts from what is known, the state
itself), the states between spans follow one from the other, and then all spans are walked again, with results. The walk back over the
gradients is cut likewise: there spans count from the last.

Seen on an H100, 8,192 tokens, K 128, V 256, forward: 16 heads in two spans 0.350 -> 0.329 ms; 8 heads in four 0.204, 4 in six 0.164,
2 in eight 0.126 (benchmarks/results/gated_delta_rule.jsonl).
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.tuning import HopperSpans as Tuning
from pallas_kernels.hardware import HOPPER_MULTIPROCESSORS

WIDTH = 64  # columns of a state that a thread block carries
KEY = 128  # width of keys, and so columns of the identity


def spans_of(walks: int, parts: int, count: int, back: bool = False) -> int:
    """How many spans to cut rows of `count` chunks into, for the walk or the walk back; walks is batch x heads, parts the blocks of each.

    As many as leave a multiprocessor to each block of both kernels; two only where that was seen to win.
    """
    fewest = 2 if count <= Tuning.two and not back else 3

    def blocks(spans):
        return walks * max(spans * parts, passages_of(spans, parts))

    numbers = range(fewest, Tuning.most + 1) if count >= Tuning.row else ()
    spans = max((n for n in numbers if blocks(n) <= HOPPER_MULTIPROCESSORS and n * Tuning.shortest <= count), default=1)
    return -(-count // -(-count // spans))  # none is empty


def cut(count: int, spans: int, span) -> tuple:
    """The first chunk of a span and its number of chunks: as many in each, but the last may have fewer."""
    each = -(-count // spans)
    assert (spans - 1) * each < count, "an empty span"
    first = span * each
    return first, each if each * spans == count else jnp.minimum(each, count - first)


def passages_of(spans: int, parts: int) -> int:
    """Blocks of one head that walk all spans but the last one."""
    return parts + (spans - 2) * (parts + KEY // WIDTH)


def place(block, parts: int) -> tuple:
    """Which span (counted from where the walk begins) and which columns one of these blocks walks; parts and more are the identity's."""
    rest = block - parts
    later = rest >= 0
    span = jnp.where(later, 1 + lax.div(rest, parts + KEY // WIDTH), 0)
    return span, jnp.where(later, lax.rem(rest, parts + KEY // WIDTH), block)


def compose(first: jax.Array, passed: jax.Array) -> jax.Array:
    """States before each span [B, H, S, 128, V] from that before the first [B, H, 128, V] and what the passages through all but the last
    left [B, H, S - 1, 128, V + 128]: the state after the first, then B and A side by side. float32."""
    width = first.shape[3]
    states = [first, passed[:, :, 0, :, :width]]
    for span in range(1, passed.shape[2]):
        added, passing = passed[:, :, span, :, :width], passed[:, :, span, :, width:]
        states.append(added + jnp.matmul(passing, states[-1], precision=lax.Precision.HIGHEST))
    return jnp.stack(states, axis=2)
