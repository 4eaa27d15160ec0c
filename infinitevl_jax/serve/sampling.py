"""From logits to the next token: greedy, or sampled with temperature, top-k, top-p and min-p; what
was said may be penalised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from infinitevl_jax.inputs.arrays import INT32_MAX, number, whole_number


@dataclass(frozen=True)
class Sampling:
    """How to choose a token.

    temperature: 0 is greedy; above, logits are divided by it and a token is drawn.
    top_k: draw from the k likeliest tokens; 0 from all.
    top_p: draw from the likeliest tokens that together reach this probability.
    min_p: draw from the tokens at least this fraction as likely as the likeliest.
    repetition_penalty: the logits of tokens that the sequence holds already, prompt included, are
      divided by this where positive and multiplied where negative (greedy, too); 1 changes nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        def check(name, low, high, cure):
            object.__setattr__(
                self, name, number(getattr(self, name), f"sampling with {name}", low, high, cure)
            )

        check("temperature", 0, 1e30, "temperature >= 0, and finite")
        object.__setattr__(
            self, "top_k", whole_number(self.top_k, "sampling with top_k", 0, INT32_MAX)
        )
        check("top_p", 1e-30, 1, "0 < top_p <= 1")
        check("min_p", 0, 1, "0 <= min_p <= 1")
        check("repetition_penalty", 1e-3, 1e3, "above 0; 1 changes nothing, 1.05 is usual")


class Settings(NamedTuple):
    """`Sampling` of many sequences, an array [rows] a setting."""

    temperature: Array | np.ndarray  # f32
    top_k: Array | np.ndarray  # int32
    top_p: Array | np.ndarray  # f32
    min_p: Array | np.ndarray  # f32
    repetition_penalty: Array | np.ndarray  # f32

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> "Settings":
        """One row for each, on the host."""

        def column(name, dtype):
            return np.array([getattr(row, name) for row in rows], dtype)

        return cls(
            *[column(name, np.int32 if name == "top_k" else np.float32) for name in cls._fields]
        )

    @classmethod
    def greedy(cls, count: int) -> "Settings":
        """`count` rows that take the likeliest token."""
        return cls.of([Sampling()] * count)


@jax.named_scope("sampling")
def choose(
    logits: Array,
    seed: Array,
    number: Array,
    settings: Settings,
    occurred: Array,
    sampled: bool = True,
) -> Array:
    """The next token of each sequence.

    A row's token depends on this row alone.

    Args:
      logits: [rows, vocab].
      seed: [rows, 2] uint32, seed and row of the request.
      number: [rows] int32, tokens chosen before.
      occurred: [rows, vocab] bool, what repetition_penalty applies to.
      sampled: False promises that all rows are greedy. A GPU would ask the host whether one is not,
        and wait for the answer after each token.

    Returns:
      [rows] int32.
    """
    logits = logits.astype(jnp.float32)
    penalty = settings.repetition_penalty[:, None]
    penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(occurred, penalised, logits)
    likeliest = jnp.argmax(logits, -1).astype(jnp.int32)

    if not sampled:
        return likeliest

    def draw():
        keys = jax.vmap(_key)(seed, number)
        drawn = jax.vmap(_draw)(keys, logits, settings).astype(jnp.int32)
        return jnp.where(settings.temperature > 0, drawn, likeliest)

    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda: likeliest)


def _key(seed: Array, number: Array) -> Array:
    key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])
    return jax.random.fold_in(key, number)


def _draw(key: Array, logits: Array, settings: Settings) -> Array:
    """One token of one sequence: logits [vocab], settings of rank 0."""
    # the likeliest token has 0, so that a cold temperature cannot overflow
    cold = jnp.maximum(settings.temperature, jnp.finfo(jnp.float32).tiny)
    logits = (logits - jnp.max(logits)) / cold
    order = jnp.sort(logits, descending=True)
    count = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, len(logits)), len(logits))
    least = order[count - 1]
    order = jnp.where(order < least, -jnp.inf, order)
    share = jax.nn.softmax(order)
    before = jnp.cumsum(share) - share
    # the smallest set of tokens whose probability reaches top_p
    nucleus = jnp.min(jnp.where(before < settings.top_p, order, jnp.inf))
    least = jnp.where(settings.top_p < 1, nucleus, least)
    least = jnp.maximum(least, jnp.where(settings.min_p > 0, jnp.log(settings.min_p), -jnp.inf))
    return jax.random.categorical(key, jnp.where(logits < least, -jnp.inf, logits))
