"""A batch taken in parts gives the step of the batch taken at once, however uneven the parts."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest
from tiny_run import write_preset

from infinitevl_jax.config.model import FULL
from infinitevl_jax.config.objective import DistillConfig, LayerwiseConfig, SupervisedConfig
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.data.collate import branch_batch, rows_batch
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.encoded import Branch, EncodedConversation
from infinitevl_jax.data.sources.tfds import Dataset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import initialize
from infinitevl_jax.sharding import make_mesh
from infinitevl_jax.train.accumulate import check_accumulation, split
from infinitevl_jax.train.models import common_layout
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.setup import prepare_start
from infinitevl_jax.train.step import (
    StageLoss,
    batch_axes,
    init_state,
    model_of,
    put_batch,
    train_step,
)

QUICK = {"xla_backend_optimization_level": 0}
RUN = RunConfig(fsdp=2)
OBJECTIVES = {
    "supervised": SupervisedConfig(),
    "distill": DistillConfig(temperature=1.7, kl=0.7, cross_entropy=0.3, prompt_weight=0.25),
    "layerwise": LayerwiseConfig(),
}


class Made:
    """A student, its teacher, and batches of 4 rows with 0 to 3 questions each."""

    def __init__(self, folder, data):
        preset = load_preset(write_preset(folder, data))
        source = Dataset("tiny_vqa", data, "train")
        start = prepare_start(preset.model, source, folder, 0)
        text = dataclasses.replace(start.config.text, layer_types=(FULL,) * 4)
        self.configs = {STUDENT: start.config}
        self.configs[TEACHER] = dataclasses.replace(start.config, text=text)
        self.layout = common_layout(*self.configs.values())
        self.params = {
            name: initialize(config, jax.random.key(seed), scanned=self.layout)
            for seed, (name, config) in enumerate(self.configs.items())
        }
        encoder = Encoder(source, start.processor, start.config)
        shape = dataclasses.replace(preset.train.data, batch=4, patches=64, length=56, questions=3)
        rows = [encoder[i] for i in range(len(encoder))]
        rows = [row for row in rows if len(row.branches) == 3][:4]
        asked = [range(2), range(3), range(0), range(1)]
        packed = [
            [self.whole(row, row.branches[i]) for i in which]
            for row, which in zip(rows, asked, strict=True)
        ]
        self.batches = {
            "branches": branch_batch(rows, asked, start.config, shape, 4, 12),
            "packed": rows_batch(packed, shape, start.config),
        }

    def whole(self, row, branch):
        """A question as a conversation of its own."""
        tokens = np.concatenate([row.prefix.tokens, branch.tokens])
        answer = np.concatenate([np.zeros(len(row.prefix.tokens), bool), branch.answer])
        return EncodedConversation(
            Branch(tokens, answer, branch.turn), row.prefix.pixels, row.prefix.grids
        )

    def step(self, name, form, accumulate):
        """The student's parameters -> metrics and gradient of a step."""
        models = {n: model_of(c, RUN, stacked=self.layout) for n, c in self.configs.items()}
        held = {} if name == "supervised" else {TEACHER: self.params[TEACHER]}
        loss = StageLoss(OBJECTIVES[name], {n: models[n] for n in (STUDENT, *held)})
        optimizer = optax.trace(0.9)  # keeps the first gradient as it is
        mesh = make_mesh(RUN)
        compiled = jax.jit(
            partial(train_step, loss, optimizer, accumulate=accumulate), compiler_options=QUICK
        )

        def run(params):
            with jax.set_mesh(mesh):
                state = init_state(params, list(params), optimizer)
                new, metrics = compiled(state, put_batch(self.batches[form], mesh), held=held)
            return metrics, {n: np.asarray(new.optimizer.trace[n]) for n in params}

        return run


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    return Made(tmp_path_factory.mktemp("run"), tiny_data)


@pytest.mark.parametrize(
    "name, form",
    [("supervised", "branches"), ("distill", "packed"), ("layerwise", "packed")],
)
def test_parts_give_the_step_of_the_whole(made, name, form):
    """To 1e-6 of the largest gradient, or to what one bit of every weight changes."""
    params = made.params[STUDENT]
    step = made.step(name, form, 1)
    whole, expected = step(params)
    nudged = {n: np.nextafter(p, np.float32(np.inf)) for n, p in params.items()}
    rounding = apart(step(nudged)[1], expected)
    parts, gradient = made.step(name, form, 2)(params)
    assert abs(float(parts.loss) - float(whole.loss)) <= 1e-6 * float(whole.loss)
    assert abs(float(parts.grad_norm) / float(whole.grad_norm) - 1) <= max(1e-6, rounding)
    for key, value in whole.means.items():
        assert abs(float(parts.means[key]) - float(value)) <= 1e-6, key
    assert rounding < 1e-5 and apart(gradient, expected) <= max(1e-6, rounding)


def apart(gradient, expected):
    """The largest difference, as a share of the largest gradient."""
    largest = max(np.abs(x).max() for x in expected.values())
    return max(np.abs(gradient[key] - value).max() for key, value in expected.items()) / largest


def test_weights_need_no_model(made):
    """Of several terms the weights are known before the first part, at no cost."""
    batch = made.batches["packed"]
    loss = StageLoss(
        OBJECTIVES["distill"],
        {n: model_of(c, RUN, stacked=made.layout) for n, c in made.configs.items()},
    )

    def weights(student, teacher, batch):
        return [term.weight for term in loss(student, {}, batch, {TEACHER: teacher}).loss]

    compiled = jax.jit(weights).lower(*made.params.values(), batch).compile()
    tokens = batch.branches.tokens.size
    assert compiled.cost_analysis()["flops"] < 20 * tokens  # one layer has 10,000 a token


def test_parts_are_the_rows_of_each_device(made):
    batch, axes = made.batches["branches"], batch_axes(made.batches["branches"])
    mesh = make_mesh(RUN)
    with jax.set_mesh(mesh):
        parts = jax.jit(lambda b: split(b, axes, 2))(put_batch(batch, mesh))
    tokens = np.asarray(parts.prefix.tokens)
    assert (tokens[0] == batch.prefix.tokens[[0, 2]]).all()
    assert (tokens[1] == batch.prefix.tokens[[1, 3]]).all()
    for part in (0, 1):
        for row, parent in enumerate(np.asarray(parts.parents)[part]):
            assert parent == row // 3
    assert np.asarray(parts.weights).sum() == batch.weights.sum()


def test_parts_that_do_not_divide(tmp_path, tiny_data):
    preset = load_preset(write_preset(tmp_path, tiny_data), ["train.accumulate=3"])
    with pytest.raises(InfiniteVLError, match="train.accumulate is 3, a device has 4 of the 8"):
        check_accumulation(make_mesh(RUN), preset.train)
