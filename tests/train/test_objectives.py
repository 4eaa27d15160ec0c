"""Objectives equal plain implementations of whole conversations, value and gradient, for packed
rows and for branches of an image's state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import write_preset

from infinitevl_jax.config.model import FULL, LINEAR, SLIDING
from infinitevl_jax.config.objective import DistillConfig, LayerwiseConfig, SupervisedConfig
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.data.collate import PackedRows, branch_batch, packed_batch
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.encoded import Branch, EncodedConversation
from infinitevl_jax.data.sources.tfds import Dataset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.packing import Packing
from infinitevl_jax.nn.params import functional, initialize, parameters, unstack
from infinitevl_jax.train.models import common_layout
from infinitevl_jax.train.objectives import layerwise, objective
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.setup import prepare_start
from infinitevl_jax.train.step import StageLoss, model_of
from pallas_kernels.testing.parity import rel_rms

QUICK = {"xla_backend_optimization_level": 0}
RUN = RunConfig(fsdp=1)
DISTILL = DistillConfig(temperature=1.7, kl=0.7, cross_entropy=0.3, prompt_weight=0.25)


class Made:
    """A hybrid, an attention model of its sizes, and the same conversations in each form."""

    def __init__(self, folder, data):
        tower = ["model.vision.depth=2", "model.vision.fullatt_block_indexes=[1]"]  # both kinds
        preset = load_preset(write_preset(folder, data), tower)
        source = Dataset("tiny_vqa", data, "train")
        start = prepare_start(preset.model, source, folder, 0)
        self.student = start.config
        text = dataclasses.replace(start.config.text, layer_types=(FULL,) * 4)
        self.teacher = dataclasses.replace(start.config, text=text)
        self.layout = common_layout(self.student, self.teacher)
        # With keys 0 and 1 the gradient of an A_log cancels to a hundredth of its usual size, and
        # one bit of every weight moves it by 5e-5.
        self.params = {
            name: initialize(config, jax.random.key(seed), scanned=self.layout)
            for seed, (name, config) in enumerate(self.configs.items(), 2)
        }
        encoder = Encoder(source, start.processor, start.config)
        shape = dataclasses.replace(preset.train.data, patches=64, length=24)
        rows = [encoder[i] for i in (0, 3)]
        questions = [range(len(row.branches)) for row in rows]
        count = sum(map(len, questions))
        branches = branch_batch(rows, questions, start.config, shape, 2, count)
        wholes, self.prefix = [], []
        for row in rows:
            for turn in row.branches:
                whole = np.concatenate([row.prefix.tokens, turn.tokens])
                answer = np.concatenate([np.zeros(len(row.prefix.tokens), bool), turn.answer])
                branch = Branch(whole, answer, turn.turn)
                wholes.append(EncodedConversation(branch, row.prefix.pixels, row.prefix.grids))
                self.prefix.append(len(row.prefix.tokens))
        alone = Packing.one_per_row([whole.tokens for whole in wholes], 24, patches=128)
        self.rows = packed_batch(wholes, alone, start.config)
        packed = PackedRows(start.config, dataclasses.replace(shape, length=96, patches=192), 2)
        assert all(packed.add(whole) for whole in wholes)
        self.batches = {"packed": packed.batch(), "branches": branches}
        self.first = [0, *np.cumsum([len(each) for each in questions])[:-1]]

    @property
    def configs(self):
        return {STUDENT: self.student, TEACHER: self.teacher}

    def loss(self, options, run=RUN, teacher=None):
        models = {
            name: model_of(config, run, stacked=self.layout)
            for name, config in self.configs.items()
        }
        if teacher is not None:
            models[TEACHER] = teacher
        return StageLoss(options, models)

    def gradient(self, options, batch, run=RUN):
        """Loss, gradient by layer-by-layer name, and logged means of an objective."""
        loss = self.loss(options, run)

        def value(params, teacher):
            found = loss(params, {}, batch, {TEACHER: teacher})
            return found.value, {name: mean.value for name, mean in found.logged.items()}

        run = jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options=QUICK)
        (total, logged), found = run(self.params[STUDENT], self.params[TEACHER])
        return float(total), unstack(self.student, dict(found), self.layout), logged

    def plain(self, value):
        """value(student, teacher, their inputs) of unstacked models, and its gradient."""
        alone = {
            name: unstack(config, dict(self.params[name]), self.layout)
            for name, config in self.configs.items()
        }
        bind = {name: functional(c, scanned=False) for name, c in self.configs.items()}

        def loss(params):
            return value(bind[STUDENT](params), bind[TEACHER](alone[TEACHER]))

        total, found = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(alone[STUDENT])
        return float(total), found


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    return Made(tmp_path_factory.mktemp("run"), tiny_data)


def run_whole(vlm, batch, collect=False):
    x = vlm.embed(batch.branches, vlm.encode(batch.patches))
    return vlm.decode(x, batch.branches, collect=collect)


def agree(found, expected):
    assert abs(found[0] - expected[0]) <= 1e-5 * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        assert rel_rms(found[1][name], wanted) <= 1e-5, name


def test_supervised(made):
    batch = made.rows

    def plain(student, teacher):
        logp = jax.nn.log_softmax(student.logits(run_whole(student, batch)[0]))
        chosen = jnp.take_along_axis(logp, batch.targets[..., None], -1)[..., 0]
        return -(chosen * batch.weights).sum() / batch.weights.sum()

    agree(made.gradient(SupervisedConfig(), made.batches["packed"]), made.plain(plain))


@pytest.mark.parametrize("form", ["packed", "branches"])
def test_distill(made, form):
    batch, t = made.rows, DISTILL.temperature
    text = (batch.branches.token_index >= 0) & (batch.targets != made.student.image_token_id)
    if form == "branches":  # tokens of the prefix have no targets there
        for row, length in enumerate(made.prefix):
            text[row, :length] = False
    weights = np.where(batch.weights > 0, 1, DISTILL.prompt_weight * text)
    assert (weights == 0.25).any() and (weights == 0).any() and (weights == 1).any()

    def plain(student, teacher):
        p = jax.nn.softmax(teacher.logits(run_whole(teacher, batch)[0]) / t)
        logits = student.logits(run_whole(student, batch)[0])
        kl = (p * (jnp.log(p) - jax.nn.log_softmax(logits / t))).sum(-1)
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits), np.asarray(batch.targets)[..., None], -1
        )[..., 0]
        entropy = -(chosen * batch.weights).sum() / batch.weights.sum()
        return 0.7 * t**2 * (kl * weights).sum() / weights.sum() + 0.3 * entropy

    found = made.gradient(DISTILL, made.batches[form])
    agree(found, made.plain(plain))
    assert 0 <= found[2]["agreement"] <= 1 and found[2]["kl"] > 0


@pytest.mark.parametrize(
    ("form", "options", "remat", "scan"),
    [
        ("packed", LayerwiseConfig(), "full", True),
        ("branches", LayerwiseConfig(layer_types=(LINEAR,)), "none", True),
        ("packed", LayerwiseConfig(distance="mse", layers=(0, 3), factor=1e3), "dots", False),
    ],
)
def test_layerwise(made, form, options, remat, scan):
    batch = made.rows
    counted = np.asarray(batch.branches.token_index >= 0, np.float32)
    if form == "branches":  # the prefix of an image counts once
        for row, length in enumerate(made.prefix):
            counted[row, :length] *= row in made.first
    layers = layerwise.compared(made.student.text.layer_types, options)

    def plain(student, teacher):
        _, _, inputs = run_whole(teacher, batch, collect=True)
        infos = [v.token_info(batch.branches, v.positions(batch.branches)) for v in made_vlms]
        total = 0
        for i in layers:
            x = jax.lax.stop_gradient(inputs[i])
            mine, theirs = student.layers.layers()[i], teacher.layers.layers()[i]
            got, _ = mine.self_attn(mine.input_layernorm(x), None, infos[0])
            wanted, _ = theirs.self_attn(theirs.input_layernorm(x), None, infos[1])
            mean = ((got - wanted) ** 2).mean(-1)
            distance = mean if options.distance == "mse" else jnp.sqrt(mean + (counted == 0))
            total += (distance * counted).sum() / counted.sum() / len(layers)
        return options.factor * total

    made_vlms = [
        functional(c, scanned=False)(unstack(c, dict(made.params[n]), made.layout))
        for n, c in made.configs.items()
    ]
    found = made.gradient(options, made.batches[form], RunConfig(fsdp=1, remat=remat, scan=scan))
    agree(found, made.plain(plain))
    trained = {name for name, g in found[1].items() if np.asarray(g).any()}
    assert trained and all(
        int(name.split(".")[1]) in layers and ("self_attn" in name or "input_layernorm" in name)
        for name in trained
    )


def test_a_student_that_is_the_teacher_has_no_loss(made):
    """Divergence, distances and their gradients are 0."""
    same = model_of(made.student, RUN, stacked=made.layout)
    for options in (DistillConfig(prompt_weight=1.0), LayerwiseConfig()):
        loss = made.loss(options, teacher=same)

        def value(params, loss=loss):
            frozen = jax.lax.stop_gradient(params)
            found = loss(params, {}, made.batches["packed"], {TEACHER: frozen})
            return found.value, found.logged

        run = jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options=QUICK)
        (total, logged), found = run(made.params[STUDENT])
        assert abs(float(total)) <= 1e-6
        for name, gradient in found.items():
            assert float(jnp.abs(gradient).max()) <= 1e-6, name
        if isinstance(options, DistillConfig):
            assert float(logged["agreement"].value) == 1


@pytest.mark.parametrize(
    ("options", "change", "culprit"),
    [
        (DISTILL, {"vocab_size": 7}, "vocabulary"),
        (LayerwiseConfig(), {"layer_types": (SLIDING,) * 3}, "num_hidden_layers is 3"),
        (LayerwiseConfig(layers=(4,)), {}, "no layer 4"),
        (LayerwiseConfig(layer_types=(FULL,)), {}, f"no layer {FULL}"),
        (LayerwiseConfig(layers=(0,), layer_types=(LINEAR,)), {}, "no layer of both"),
    ],
)
def test_models_that_do_not_suit_are_refused(made, options, change, culprit):
    text = dataclasses.replace(made.student.text, **change)
    configs = made.configs | {STUDENT: dataclasses.replace(made.student, text=text)}
    with pytest.raises(InfiniteVLError, match=culprit):
        objective(options.name).check(configs, options)


def test_models_of_one_layout_have_the_same_names(made):
    ours, theirs = (parameters(c, scanned=made.layout) for c in made.configs.values())
    same = {n for n in ours if n in theirs and ours[n].layers == theirs[n].layers}
    stacked = "layers.blocks.1.mlp.up_proj.kernel"
    assert stacked in same and ours[stacked].layers[0] == "layers.1.mlp.up_proj.kernel"
    assert {n for n in ours if "self_attn" not in n} <= same
