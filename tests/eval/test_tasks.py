"""`infinitevl eval`: each question alone, exact answers by task, beside the blind baseline."""

import json

import pytest
from typer.testing import CliRunner

from infinitevl_jax import InfiniteVL, InfiniteVLError
from infinitevl_jax.cli import app
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.data.mixture import open_mixture
from infinitevl_jax.eval.report import choose
from infinitevl_jax.eval.tasks import answer_alone, open_tasks
from infinitevl_jax.eval.vqa import answer_blind, score
from infinitevl_jax.train.setup import prepare_start

PRESET = """\
[model]
tokenizer = "bytes"
min_pixels = 256
max_pixels = 1024
initializer_range = 0.5

[model.text]
layer_types = ["sliding_attention", "linear_attention"]
vocab_size = 400
hidden_size = 16
intermediate_size = 16
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 8
mrope_section = [2, 1, 1]
sliding_window = 8
num_linear_heads = 1
linear_head_dim = 8

[model.vision]
depth = 1
hidden_size = 16
intermediate_size = 16
num_heads = 2
patch_size = 8
temporal_patch_size = 1
window_size = 16
fullatt_block_indexes = [0]
out_hidden_size = 16

[train.data.sources]
shapes = {kind = "drawn", held_out = "test[:4]", options = {task = "shapes", rows = 60}}
recall = {kind = "drawn", held_out = "test[:3]", options = {task = "recall", rows = 50, frames = 3}}
unused = {kind = "drawn", options = {task = "words", rows = 50}}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a preset and the evaluation of a random model that writes letters; the model,
    whose programs are compiled once, and its processor."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "preset.toml").write_text(PRESET)
    preset = load_preset(folder / "preset.toml")
    start = prepare_start(preset.model, open_mixture(preset.train.data), folder, 0)
    params = dict(InfiniteVL.random(start.config, 5).params)
    special = start.processor.tokenizer.token_id("<|endoftext|>")
    name = "embed_tokens.embedding"
    params[name] = params[name].at[special:].multiply(1e-2).at[97:].multiply(1e-2)
    model = InfiniteVL(start.config, params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InfiniteVL, "from_pretrained", classmethod(lambda *a, **options: model))
        words = ["eval", start.files, folder / "preset.toml", "--output", folder / "out"]
        words += ["--batch", 4, "--max-new-tokens", 5]
        done = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return folder, done.stdout, preset.train.data, model, start.processor


def test_the_command_writes_what_a_plain_count_gives(work):
    folder, table, data, model, processor = work
    tasks = open_tasks(data)
    assert set(tasks) == {"shapes", "recall"}
    found = json.loads((folder / "out" / "results.json").read_text())
    for name, task in tasks.items():
        asked = [(row, i) for row in task.rows for i in range(len(row.questions))]
        answers, tokens = answer_alone(model, processor, asked, batch=4, max_new_tokens=5)
        right = sum(row.answers[i] == a for (row, i), a in zip(asked, answers, strict=True))
        assert found[name]["questions"] == len(asked)
        assert found[name]["accuracy"] == right / len(asked)
        blind = score(task.rows, answer_blind(task.known, task.rows))
        assert found[name]["blind_accuracy"] == blind.all
        assert found[name]["tokens"] == round(tokens, 1)
        line = next(line for line in table.splitlines() if line.startswith(name))
        assert str(len(asked)) in line and f"{blind.all:.1%}" in line
    assert (folder / "out" / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_batch_answers_as_a_question_alone(work):
    _, _, data, model, processor = work
    rows = [row for task in open_tasks(data).values() for row in task.rows]
    asked = [(row, 0) for row in rows]
    answers, _ = answer_alone(model, processor, asked, batch=4, max_new_tokens=5)
    assert len(set(answers)) > 1
    number = max(range(len(rows)), key=lambda i: len(rows[i].pictures))
    content = [*rows[number].pictures, {"type": "text", "text": rows[number].questions[0]}]
    batch = processor([{"role": "user", "content": content}])
    alone = model.generate(**batch, max_new_tokens=5)
    assert processor.decode(alone[0]).strip() == answers[number]


def test_samples_show_wrong_answers_first(work):
    task = open_tasks(work[2])["shapes"]
    answers = [list(row.answers) for row in task.rows]
    answers[2] = ["no idea"] * len(answers[2])
    shown = choose(task.rows, type("R", (), {"answers": answers}))
    assert [sample[2] == sample[0].answers[sample[1]] for sample in shown] == [False, *[True] * 3]


def test_a_preset_without_held_out_rows_is_refused(work):
    data = load_preset(
        work[0] / "preset.toml",
        [f"train.data.sources.{name}.held_out=" for name in ("shapes", "recall")],
    ).train.data
    with pytest.raises(InfiniteVLError, match="no source has held-out rows"):
        open_tasks(data)
