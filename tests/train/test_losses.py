"""Losses in chunks equal the plain ones, value and gradient, and keep no logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinitevl_jax.train.losses import LOGITS, answer_loss, chunk_length, distill_loss


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


@pytest.mark.parametrize("chunk", [1, 5, 23, None])
def test_divergence_in_chunks(chunk):
    hidden, table, targets, answers = inputs()
    rng = np.random.default_rng(1)
    known = jnp.asarray(rng.normal(size=hidden.shape), jnp.float32)
    weights = jnp.asarray(rng.random(answers.shape), jnp.float32) * (answers == 0)
    t = 1.5

    def chunked(hidden, table):
        sums = distill_loss(
            (lambda x: x @ table * 2, known),
            (lambda x: x @ table, hidden),
            targets,
            weights,
            answers,
            t,
            chunk,
        )
        return sums.kl + 0.5 * sums.cross_entropy, sums

    def plain_sum(hidden, table):
        wanted, logits = known @ table * 2, hidden @ table
        p = jax.nn.softmax(wanted / t)
        kl = (p * (jnp.log(p) - jax.nn.log_softmax(logits / t))).sum(-1)
        return (weights * kl).sum() + 0.5 * plain(hidden, table, targets, answers)

    (value, sums), found = jax.value_and_grad(chunked, (0, 1), has_aux=True)(hidden, table)
    expected, wanted = jax.value_and_grad(plain_sum, (0, 1))(hidden, table)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)
    best = jnp.argmax(hidden @ table, -1)
    np.testing.assert_allclose(sums.right, (answers * (best == targets)).sum())
    agreed = best == jnp.argmax(known @ table, -1)
    np.testing.assert_allclose(sums.agreed, (weights * agreed).sum(), rtol=1e-6)


def test_chunks_follow_the_rows_of_a_device():
    head = lambda x: jnp.zeros((*x.shape[:-1], 152064))  # noqa: E731
    assert chunk_length(head, jnp.zeros((1, 8192, 4))) == 512
    assert chunk_length(head, jnp.zeros((4, 8192, 4))) == 128
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert chunk_length(head, jnp.zeros((4, 8192, 4))) == 512
    assert chunk_length(lambda x: x, jnp.zeros((64, 12, 40))) == LOGITS // (64 * 40)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("loss", ["cross entropy", "divergence"])
def test_memory_of_a_long_batch(loss, rows):
    """32,768 tokens of Qwen's vocabulary, with the gradients of hidden states and table."""
    length, width, vocab = 32768 // rows, 2048, 151936

    def shape(*sides, dtype="float32"):
        return jax.ShapeDtypeStruct(sides, dtype)

    def value(hidden, table, known, teacher, targets, weights):
        def head(x, table):
            return jnp.einsum("btd,vd->btv", x, table)

        if loss == "cross entropy":
            return answer_loss(lambda x: head(x, table), hidden, targets, weights).loss
        sums = distill_loss(
            (lambda x: head(x, teacher), known),
            (lambda x: head(x, table), hidden),
            targets,
            weights,
            weights,
            2.0,
        )
        return sums.kl + sums.cross_entropy

    tokens = rows, length
    args = [shape(*tokens, width), shape(vocab, width)] * 2
    args += [shape(*tokens, dtype="int32"), shape(*tokens)]
    step = jax.jit(jax.value_and_grad(value, (0, 1)))
    memory = step.lower(*args).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 3e9, f"{memory.temp_size_in_bytes / 1e9:.2f} GB"
