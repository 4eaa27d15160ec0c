"""Questions on branches of an image's state equal whole conversations: loss and gradients."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_run import write_preset

from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.data.collate import PackedRows, branch_batch
from infinitevl_jax.data.encode import Branch, Encoder
from infinitevl_jax.data.source import Source
from infinitevl_jax.nn.params import initialize
from infinitevl_jax.train.setup import prepare_start
from infinitevl_jax.train.step import forward_loss, model_of
from pallas_kernels.testing.parity import rel_rms


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    """Parameters, and the same questions as branches, as one row each, and as packed rows."""
    folder = tmp_path_factory.mktemp("run")
    preset = load_preset(write_preset(folder, tiny_data))
    source = Source("tiny_vqa", tiny_data, "train")
    start = prepare_start(preset.model, source, folder, 0)
    encoder = Encoder(source, start.processor, start.config)
    data = dataclasses.replace(preset.train.data, patches=64, length=24)
    rows = [encoder[i] for i in (0, 3, 5)]
    questions = [range(len(row.branches)) for row in rows]
    count = sum(map(len, questions))
    batches = {"branches": branch_batch(rows, questions, start.config, data, 3, count)}
    for name, size, length in (("rows", count, 24), ("packed", 2, 96)):
        packed = PackedRows(
            start.config, dataclasses.replace(data, length=length, patches=256), size
        )
        for row in rows:
            for branch in row.branches:
                whole = np.concatenate([row.prefix, branch.tokens])
                answer = np.concatenate([np.zeros(len(row.prefix), bool), branch.answer])
                if name == "rows":
                    packed.used = [
                        length if row and used else used for row, used in enumerate(packed.used, 1)
                    ]
                assert packed.add(Branch(whole, answer, branch.turn), row.pixels, row.grid)
        batches[name] = packed.batch()
    return start.config, initialize(start.config, jax.random.key(1), scanned=True), batches


def gradient(made, form, run=RunConfig(fsdp=1)):  # noqa: B008  frozen
    config, params, batches = made
    model = model_of(config, run)

    def loss(params):
        sums = forward_loss(model, params, batches[form])
        return sums.loss / sums.tokens, sums

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
        int(sums.tokens)
        == int(expected[1].tokens)
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
