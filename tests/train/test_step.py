"""Questions on branches of an image's state equal whole conversations: loss and gradients."""

import dataclasses
from functools import partial

import jax
import numpy as np
import optax
import pytest
from tiny_run import write_preset

from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.data.collate import PackedRows, branch_batch, packed_batch
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.encoded import Branch, EncodedConversation
from infinitevl_jax.data.sources.tfds import Dataset
from infinitevl_jax.inputs.packing import Packing
from infinitevl_jax.nn.params import initialize
from infinitevl_jax.train.setup import prepare_start
from infinitevl_jax.train.step import init_state, model_of, supervised_loss, train_step
from pallas_kernels.testing.parity import rel_rms


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    """Parameters, and the same questions as branches, as one row each, and as packed rows."""
    folder = tmp_path_factory.mktemp("run")
    preset = load_preset(write_preset(folder, tiny_data))
    source = Dataset("tiny_vqa", tiny_data, "train")
    start = prepare_start(preset.model, source, folder, 0)
    encoder = Encoder(source, start.processor, start.config)
    data = dataclasses.replace(preset.train.data, patches=64, length=24)
    rows = [encoder[i] for i in (0, 3, 5)]
    questions = [range(len(row.branches)) for row in rows]
    count = sum(map(len, questions))
    batches = {"branches": branch_batch(rows, questions, start.config, data, 3, count)}
    wholes = []
    for row in rows:
        for branch in row.branches:
            whole = np.concatenate([row.prefix.tokens, branch.tokens])
            answer = np.concatenate([np.zeros(len(row.prefix.tokens), bool), branch.answer])
            branch = Branch(whole, answer, branch.turn)
            wholes.append(EncodedConversation(branch, row.prefix.pixels, row.prefix.grids))
    alone = Packing.one_per_row([whole.tokens for whole in wholes], 24, patches=256)
    batches["rows"] = packed_batch(wholes, alone, start.config)
    packed = PackedRows(start.config, dataclasses.replace(data, length=96, patches=256), 2)
    assert all(packed.add(whole) for whole in wholes)
    batches["packed"] = packed.batch()
    return start.config, initialize(start.config, jax.random.key(1), scanned=True), batches


def gradient(made, form, run=RunConfig(fsdp=1)):  # noqa: B008  frozen
    config, params, batches = made
    model = model_of(config, run)

    def loss(params):
        measured = supervised_loss(model)(params, {}, batches[form])
        return measured.value, measured.loss[0]

    options = {"xla_backend_optimization_level": 0}
    (value, sums), found = jax.jit(
        jax.value_and_grad(loss, has_aux=True), compiler_options=options
    )(params)
    return float(value), sums, found


@pytest.fixture(scope="module")
def expected(made):
    return gradient(made, "rows")


@pytest.mark.parametrize("form", ["branches", "packed"])
def test_forms_of_the_same_questions_agree(made, expected, form):
    value, sums, found = gradient(made, form)
    assert (
        int(sums.weight)
        == int(expected[1].weight)
        == 2 * sum(int(w.sum() > 0) for w in made[2]["branches"].weights)
    )
    assert abs(value - expected[0]) <= 1e-5 * expected[0]
    for name, wanted in expected[2].items():
        assert rel_rms(found[name], wanted) <= 2e-5, name


@pytest.mark.parametrize(
    "form, remat, scan",
    [("rows", "dots", False), ("rows", "full", True), ("branches", "full", True)],
)
def test_neither_rematerialisation_nor_scanning_changes_anything(made, expected, form, remat, scan):
    value, _, found = gradient(made, form, RunConfig(fsdp=1, remat=remat, scan=scan))
    assert abs(value - expected[0]) <= 1e-5 * expected[0]
    for name, wanted in expected[2].items():
        assert rel_rms(found[name], wanted) <= 2e-5, name


def test_profiles_name_the_stages(made):
    """Each stage of a step, its gradients included, is a scope in the compiled program's names."""
    config, params, batches = made
    optimizer = optax.adam(1e-3)
    state = jax.eval_shape(lambda p: init_state(p, list(p), optimizer), params)
    step = jax.jit(
        partial(train_step, supervised_loss(model_of(config, RunConfig(fsdp=1))), optimizer)
    )
    text = step.lower(state, batches["rows"]).as_text(debug_info=True)
    for scope in ("jvp(forward)", "transpose(jvp(forward))", "jvp(loss)", "optimizer"):
        assert f"/{scope}/" in text, scope
