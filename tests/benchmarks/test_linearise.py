"""The linearisation program on a tiny teacher and a few text files."""

import json
import sys

import numpy as np
import pytest
from tiny_folder import full_attention_config, tiny_model, write_folder

from benchmarks.training import linearise
from benchmarks.training.text import batch_of, is_held_out, tails, training_batches
from infinitevl_jax.checkpoints import read_config
from infinitevl_jax.config.model import LINEAR, SLIDING

PLAN = """\
unseen = ["other"]

[mixers]
layer_types = ["sliding_attention", "linear_attention"]
sliding_window = 8
initialise = {name = "attention", tokens = 500}

[evaluation]
length = 16
rows = 4
multiples = [2]

[stages.layerwise]
tokens = 256
step_tokens = 64
length = 32
trainable = ['layers\\..*self_attn\\..*']
objective = {name = "layerwise"}

[stages.distill]
tokens = 128
step_tokens = 64
length = 32
trainable = {'layers\\..*self_attn\\..*' = 1.0, '.*' = 0.1}
objective = {name = "distill"}
"""


@pytest.fixture
def work(tmp_path):
    write_folder(tmp_path / "teacher", tiny_model(full_attention_config()))
    rng = np.random.default_rng(0)
    for corpus in ("one", "other"):
        (tmp_path / "texts" / corpus).mkdir(parents=True)
        for i in range(12, 24):  # number 19 is held out
            words = rng.integers(97, 123, 60).astype(np.uint8).tobytes()
            (tmp_path / "texts" / corpus / f"{i}.txt").write_bytes(words)
    (tmp_path / "plan.toml").write_text(PLAN)
    return tmp_path


def run(work, monkeypatch, *more):
    places = [str(work / name) for name in ("teacher", "texts", "out")]
    plan = ["--plan", str(work / "plan.toml"), *more]
    monkeypatch.setattr(sys, "argv", ["linearise", *places, "run.fsdp=1", *plan])
    linearise.main()
    lines = (work / "out" / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_all_stages_with_an_interruption(work, monkeypatch, capsys):
    lines = run(work, monkeypatch, "--minutes", "0")
    assert [line["stage"] for line in lines if "perplexity" in line] == ["start"] * 2
    assert "not finished" in capsys.readouterr().out
    lines = run(work, monkeypatch)
    figures = [line for line in lines if "perplexity" in line]
    assert [(line["stage"], line["corpus"]) for line in figures] == [
        (stage, corpus)
        for stage in ("start", "layerwise", "distill")
        for corpus in ("one", "other")
    ]
    for line in figures:
        assert line["unseen"] == (line["corpus"] == "other")
        assert line["ratio"] == pytest.approx(line["perplexity"] / line["teacher_perplexity"], 1e-4)
        assert 0 <= line["agreement"] <= 1 and line["kl"] >= 0
    assert "perplexity_2x" in figures[-1] and "perplexity_2x_short_history" in figures[-1]
    assert len({line["teacher_perplexity"] for line in figures if line["corpus"] == "one"}) == 1
    assert [line["step"] for line in lines if line["stage"] == "distill" and "step" in line] == [
        1,
        2,
    ]
    config = read_config(work / "out" / "distill" / "checkpoints" / "2")
    assert config.text.layer_types == (SLIDING, LINEAR)
    assert run(work, monkeypatch) == lines  # nothing is left to do


def test_rows_hold_every_prediction_once():
    texts = [np.arange(start, start + n, dtype=np.int32) for start, n in ((100, 7), (200, 30))]
    stream = training_batches(texts, 1, 9, seed=0)
    seen = []
    for _ in range(4):
        batch = next(stream)
        assert batch.branches.tokens.shape == (1, 9)
        real = batch.weights[0] > 0
        np.testing.assert_array_equal(batch.targets[0][real], batch.branches.tokens[0][real] + 1)
        seen += batch.targets[0][real].tolist()
    assert sorted(seen[:35]) == [*range(101, 107), *range(201, 230)] and len(seen) == 36
    resumed = training_batches(texts, 1, 9, seed=0, skip=3)
    np.testing.assert_array_equal(next(resumed).targets, batch.targets)


def test_only_the_end_of_a_row_counts(tmp_path):
    (piece,) = tails([np.arange(40, dtype=np.int32)], 32, 3)
    batch = batch_of([[piece]], 32, first=24)
    assert batch.weights.sum() == 8 and batch.targets[0][batch.weights[0] > 0][0] == 25
    names = [tmp_path / f"{i}.txt" for i in range(400)]
    assert 8 <= sum(map(is_held_out, names)) <= 40
