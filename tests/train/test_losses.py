"""Chunked cross entropy equals the plain one, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinitevl_jax.train.losses import answer_loss


def inputs(batch=3, length=23, width=8, vocab=31):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(batch, length, width)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
    weights = jnp.asarray(rng.random((batch, length)) < 0.4, jnp.float32).at[1].set(0)
    return hidden, table, targets, weights


def plain(hidden, table, targets, weights):
    logits = jax.nn.log_softmax(hidden @ table)
    return -jnp.sum(weights * jnp.take_along_axis(logits, targets[..., None], -1)[..., 0])


@pytest.mark.parametrize("chunk", [1, 5, 8, 23, 512])
def test_chunks_change_nothing(chunk):
    hidden, table, targets, weights = inputs()

    def chunked(hidden, table):
        return answer_loss(lambda x: x @ table, hidden, targets, weights, chunk).loss

    value, gradients = jax.value_and_grad(chunked, (0, 1))(hidden, table)
    expected, wanted = jax.value_and_grad(lambda h, t: plain(h, t, targets, weights), (0, 1))(
        hidden, table
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_counts():
    hidden, table, targets, weights = inputs()
    best = jnp.argmax(hidden @ table, -1)
    targets = targets.at[0].set(best[0])  # row 0 is all correct, row 1 has no answer
    sums = answer_loss(lambda x: x @ table, hidden, targets, weights, 7)
    right = float(jnp.sum(weights * (best == targets)))
    assert (float(sums.tokens), float(sums.right), float(sums.rows)) == (
        float(weights.sum()),
        right,
        2.0,
    )
    assert float(sums.exact) == 1.0


def test_no_logits_of_the_whole_sequence():
    """No array of the compiled gradient has the size of [batch, length, vocab]."""
    batch, length, width, vocab, chunk = 2, 256, 8, 4096, 16
    args = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((batch, length, width), "float32"), ((width, vocab), "float32"))
    ]
    tokens = jnp.zeros((batch, length), jnp.int32)

    def loss(hidden, table):
        return answer_loss(
            lambda x: x @ table, hidden, tokens, jnp.ones((batch, length)), chunk
        ).loss

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes < batch * length * vocab * 4 / 4
