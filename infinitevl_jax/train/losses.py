"""Chunked cross entropy: the logits [batch, length, vocab] are never materialised as a whole."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 512  # tokens per sequence whose logits are computed at a time


class LossSums(NamedTuple):
    """Sums over the answer tokens of a batch, all [] float32.

    Attributes:
      loss: sum of weight x cross entropy, in nats.
      tokens: sum of weights.
      right: weight of the tokens that greedy decoding predicts.
      exact: rows whose answer tokens are all predicted.
      rows: rows with an answer.
    """

    loss: Array
    tokens: Array
    right: Array
    exact: Array
    rows: Array


@jax.named_scope("loss")
def answer_loss(
    head: Callable[[Array], Array],
    hidden: Array,
    targets: Array,
    weights: Array,
    chunk: int = CHUNK,
) -> LossSums:
    """Cross entropy of `targets` under `head(hidden)`.

    Args:
      head: [batch, chunk, width] -> logits [batch, chunk, vocab].
      hidden: [batch, length, width].
      targets: [batch, length] int32, the next token of each.
      weights: [batch, length] float32, 0 = not an answer.
      chunk: tokens per sequence whose logits are computed, and recomputed for the gradient, at a
        time.
    """

    @jax.checkpoint
    def part(hidden, targets, weights):
        logits = head(hidden).astype(jnp.float32)
        # a comparison, because the gradient of a gather is a scatter into zeros of the logits' size
        chosen = jnp.sum(
            jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0), -1
        )
        loss = jax.nn.logsumexp(logits, -1) - chosen
        wrong = weights * (jnp.argmax(logits, -1) != targets)
        return jnp.sum(weights * loss), wrong.sum(1)

    length = hidden.shape[1]
    if length <= chunk:
        loss, wrong = part(hidden, targets, weights)
    else:
        short = -length % chunk

        def cut(x):  # [batch, length, ...] -> [chunks, batch, chunk, ...]
            x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

        def step(total, xs):
            return jax.tree.map(jnp.add, total, part(*xs)), None

        nothing = jnp.zeros((), jnp.float32), jnp.zeros(hidden.shape[0], jnp.float32)
        (loss, wrong), _ = jax.lax.scan(step, nothing, (cut(hidden), cut(targets), cut(weights)))
    per_row = weights.sum(1)
    answered = per_row > 0
    return LossSums(
        loss=loss,
        tokens=per_row.sum(),
        right=per_row.sum() - wrong.sum(),
        exact=jnp.sum(answered & (wrong == 0), dtype=jnp.float32),
        rows=jnp.sum(answered, dtype=jnp.float32),
    )
