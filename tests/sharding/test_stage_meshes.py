"""Objectives with a teacher on meshes of 8 devices equal those on one: loss, gradients, places."""

import dataclasses
from functools import cache, partial

import jax
import numpy as np
import optax
import pytest
from tiny import hybrid_config
from tiny_stage import OBJECTIVES, SIZES

from infinitevl_jax.config.model import FULL, LINEAR, SLIDING
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.nn.params import initialize, parameters
from infinitevl_jax.sharding import make_mesh, parameter_shardings
from infinitevl_jax.train.models import common_layout
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.step import (
    StageLoss,
    init_state,
    model_of,
    put_batch,
    state_shardings,
    train_step,
)
from pallas_kernels.testing.parity import rel_rms


class Setting:
    """A student and a teacher that share their frozen MLPs, and a step of each objective."""

    def __init__(self):
        config = dataclasses.replace(hybrid_config(layer_types=(SLIDING, LINEAR) * 2), vision=None)
        text = dataclasses.replace(config.text, **SIZES)
        config = dataclasses.replace(config, text=text)
        text = dataclasses.replace(config.text, layer_types=(FULL,) * 4)
        self.configs = {STUDENT: config, TEACHER: dataclasses.replace(config, text=text)}
        self.layout = common_layout(*self.configs.values())
        self.params = {
            name: initialize(each, jax.random.key(seed), scanned=self.layout)
            for seed, (name, each) in enumerate(self.configs.items())
        }
        self.shared = tuple(n for n in self.params[TEACHER] if "mlp" in n)
        rng = np.random.default_rng(0)
        tokens = rng.integers(1, 60, (8, 16))
        inputs = build_inputs(config, tokens).decoder
        weights = (rng.random(tokens.shape) < 0.5).astype(np.float32)
        self.batch = TrainBatch(
            None, None, inputs, None, np.roll(tokens, -1, 1).astype(np.int32), weights
        )
        self.alone = cache(lambda name: self.step(RunConfig(fsdp=1), name))

    def step(self, run, name):
        mesh = make_mesh(run)
        with jax.set_mesh(mesh):
            ops, optimizer = resolve_ops(mesh), optax.trace(0.0)  # keeps the gradient as its state
            places, known = {}, {}
            for model, config in self.configs.items():
                known[model] = parameters(config, scanned=self.layout)
                places[model] = parameter_shardings(known[model], mesh)
            put = {m: jax.device_put(self.params[m], places[m]) for m in self.params}
            trained = [n for n in put[STUDENT] if n not in self.shared]
            state = init_state(put[STUDENT], trained, optimizer)
            state = jax.device_put(state, state_shardings(state, known[STUDENT], mesh))
            own = {n: v for n, v in put[TEACHER].items() if n not in self.shared}
            models = {m: model_of(c, run, ops, self.layout) for m, c in self.configs.items()}
            loss = StageLoss(OBJECTIVES[name], models, {TEACHER: self.shared})
            options = {"xla_backend_optimization_level": 0}
            step = jax.jit(partial(train_step, loss, optimizer), compiler_options=options)
            new, metrics = step(state, put_batch(self.batch, mesh), held={TEACHER: own})
        return new, metrics, {n: np.asarray(g) for n, g in new.optimizer.trace.items()}


@pytest.fixture(scope="module")
def setting():
    return Setting()


@pytest.mark.parametrize(
    "data,fsdp,tensor,name",
    [
        (1, 4, 2, "distill"),
        (2, 4, 1, "distill"),
        (1, 8, 1, "layerwise"),
        (1, 2, 4, "layerwise"),
    ],
)
def test_loss_and_gradients_agree(setting, data, fsdp, tensor, name):
    run = RunConfig(data=data, fsdp=fsdp, tensor=tensor)
    new, metrics, gradient = setting.step(run, name)
    _, alone, expected = setting.alone(name)
    assert abs(float(metrics.loss) - float(alone.loss)) <= 1e-5 * float(alone.loss)
    for mean, value in alone.means.items():
        np.testing.assert_allclose(metrics.means[mean], value, rtol=1e-5)
    compared = [n for n, wanted in expected.items() if wanted.any()]
    assert len(compared) > 10
    for parameter, wanted in expected.items():
        assert rel_rms(gradient[parameter], wanted) <= 1e-5, parameter
    for value in jax.tree.leaves(new.frozen):
        if value.size >= 4096:
            assert value.addressable_shards[0].data.size < value.size
