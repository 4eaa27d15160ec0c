"""Sums over tokens that need the logits: the logits [batch, length, vocab] are never materialised
as a whole, neither forward nor backward."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from infinitevl_jax.sharding import batch_parts

# Values of the logits that a device computes at a time: 512 tokens of Qwen's vocabulary.
LOGITS = 512 * 152064

Head = Callable[[Array], Array]  # hidden states [..., width] -> logits [..., vocab]


def chunk_length(head: Head, hidden: Array) -> int:
    """Tokens of each sequence that may have logits at a time.

    Args:
      hidden: [batch, length, width], whose batch is sharded as the ambient mesh says.
    """
    vocab = jax.eval_shape(head, hidden[:, :1]).shape[-1]
    rows = -(-hidden.shape[0] // batch_parts())
    return max(1, LOGITS // (vocab * rows))


def sum_chunks(part: Callable[..., Any], chunk: int, *arrays: Array) -> Any:
    """Sum of part(*arrays[:, chunk of tokens]) over the chunks of a sequence.

    `part` is computed again for the gradient. The last chunk is filled up with zeros.

    Args:
      part: maps arrays [batch, chunk, ...] to a pytree of arrays.
      chunk: tokens of each sequence at a time.
      arrays: [batch, length, ...].
    """
    part, length = jax.checkpoint(part), arrays[0].shape[1]
    if length <= chunk:
        return part(*arrays)
    short = -length % chunk

    def cut(x):  # [batch, length, ...] -> [chunks, batch, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    def step(total, xs):
        return jax.tree.map(jnp.add, total, part(*xs)), None

    chunks = tuple(map(cut, arrays))
    shapes = jax.eval_shape(part, *(x[0] for x in chunks))
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(step, nothing, chunks)[0]


def cross_entropy(logits: Array, targets: Array) -> Array:
    """-log softmax(logits)[targets] in nats: [..., vocab], [...] -> [...]."""
    # a comparison, because the gradient of a gather is a scatter into zeros of the logits' size
    chosen = jnp.where(jnp.arange(logits.shape[-1]) == targets[..., None], logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, -1) - chosen


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
    head: Head, hidden: Array, targets: Array, weights: Array, chunk: int | None = None
) -> LossSums:
    """Cross entropy of `targets` under `head(hidden)`.

    Args:
      hidden: [batch, length, width].
      targets: [batch, length] int32, the next token of each.
      weights: [batch, length] float32, 0 = not an answer.
      chunk: tokens of each sequence whose logits are computed at a time; None chooses it.
    """

    def part(hidden, targets, weights):
        logits = head(hidden).astype(jnp.float32)
        wrong = weights * (jnp.argmax(logits, -1) != targets)
        return jnp.sum(weights * cross_entropy(logits, targets)), wrong.sum(1)

    chunk = chunk or chunk_length(head, hidden)
    loss, wrong = sum_chunks(part, chunk, hidden, targets, weights)
    per_row = weights.sum(1)
    answered = per_row > 0
    return LossSums(
        loss=loss,
        tokens=per_row.sum(),
        right=per_row.sum() - wrong.sum(),
        exact=jnp.sum(answered & (wrong == 0), dtype=jnp.float32),
        rows=jnp.sum(answered, dtype=jnp.float32),
    )


class DistillSums(NamedTuple):
    """Sums over the tokens of a batch, all [] float32.

    Attributes:
      kl: sum of weight x KL(teacher || student), in nats.
      cross_entropy: sum of answer weight x cross entropy.
      right: answer weight of the tokens that the student predicts greedily.
      agreed: weight of the tokens for which both predict the same greedily.
    """

    kl: Array
    cross_entropy: Array
    right: Array
    agreed: Array


@jax.named_scope("loss")
def distill_loss(
    teacher: tuple[Head, Array],
    student: tuple[Head, Array],
    targets: Array,
    weights: Array,
    answers: Array,
    temperature: float,
    chunk: int | None = None,
) -> DistillSums:
    """KL divergence of the student's next-token distribution from the teacher's, and cross entropy.

    Args:
      teacher, student: a head and its hidden states [batch, length, width].
      targets: [batch, length] int32, the next token of each.
      weights: [batch, length] float32, of the divergence.
      answers: [batch, length] float32, weights of the cross entropy.
      temperature: divides the logits of both in the divergence.
      chunk: tokens of each sequence whose logits are computed at a time; None chooses it.
    """

    def part(known, hidden, targets, weights, answers):
        wanted = teacher[0](known).astype(jnp.float32)
        logits = student[0](hidden).astype(jnp.float32)
        log_p = jax.nn.log_softmax(wanted / temperature)
        log_q = jax.nn.log_softmax(logits / temperature)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1)
        best = jnp.argmax(logits, -1)
        return DistillSums(
            jnp.sum(weights * kl),
            jnp.sum(answers * cross_entropy(logits, targets)),
            jnp.sum(answers * (best == targets)),
            jnp.sum(weights * (best == jnp.argmax(wanted, -1))),
        )

    if chunk is None:  # the logits of both are there at the same time
        chunk = max(1, chunk_length(student[0], student[1]) // 2)
    return sum_chunks(part, chunk, teacher[1], student[1], targets, weights, answers)
