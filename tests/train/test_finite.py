"""A step with a non-finite loss or gradient changes nothing and reports it in its metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from infinitevl_jax.train import step
from infinitevl_jax.train.objectives import Mean, Measured


@pytest.fixture
def take():
    """Run a step of a model with one parameter; the loss is the parameter times the batch."""

    def loss(trainable, frozen, batch, held):
        return Measured((Mean(jnp.sum(trainable["a"] * batch), jnp.float32(1)),), {})

    optimizer = optax.adam(0.1)
    state = step.init_state({"a": jnp.ones(2), "b": jnp.ones(2)}, ["a"], optimizer)
    run = jax.jit(lambda state, batch: step.train_step(loss, optimizer, state, batch))
    return lambda batch, state=state: run(state, jnp.float32(batch))


def test_a_good_step_moves(take):
    state, metrics = take(2.0)
    assert int(state.step) == 1 and float(metrics.loss) == 4.0
    np.testing.assert_allclose(state.trainable["a"], 0.9, rtol=1e-5)


@pytest.mark.parametrize("batch", [np.nan, np.inf, -np.inf, 3e38])
def test_a_bad_one_does_not(take, batch):
    before, _ = take(2.0)
    after, metrics = take(batch, before)
    assert not (np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old, new)
    again, _ = take(2.0, after)
    assert int(again.step) == 2
