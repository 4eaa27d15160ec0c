"""A user's data in a run: conversations in a JSON file and a folder of pictures, beside documents,
over whole epochs, stopped and gone on with."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny_folder import tiny_config, tiny_model, write_folder

from infinitevl_jax import compilation
from infinitevl_jax.checkpoints import load_params
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.train.log import read_log
from infinitevl_jax.train.loop import train

PRESET = """\
[model]
from = "tiny"

[run]
fsdp = 1

[train]
output = "run"
epochs = 1.5
log_every = 1
checkpoint_every = 1
keep = 9
trainable = ['layers\\..*\\.self_attn\\..*']

[train.data]
batch = 2
length = 128
patches = 64

[train.data.sources.chats]
path = "my.json"
images = "photos"
train = "train[:90%]"
held_out = "train[90%:]"

[train.data.sources.tales]
path = "tales.txt"
options = {chunk = 200}
weight = 2

[train.optimizer]
peak_lr = 1e-3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_folder(folder / "tiny", tiny_model(tiny_config()))
    (folder / "photos").mkdir()
    rows = []
    for i in range(20):
        Image.new("RGB", (12, 12), (12 * i, 30, 30)).save(folder / "photos" / f"{i}.png")
        said = [{"from": "human", "value": "<image>\nHow red?"}, {"from": "gpt", "value": f"{i}."}]
        rows.append({"image": f"{i}.png", "conversations": said})
    (folder / "my.json").write_text(json.dumps(rows))
    (folder / "tales.txt").write_text("Once upon a time.\n" * 30)
    (folder / "p.toml").write_text(PRESET)
    return folder


def test_a_run_over_epochs_goes_on_exactly(folder, monkeypatch, said):
    monkeypatch.chdir(folder)
    with compilation.kept(True):
        whole = train(load_preset("p.toml"))
        assert whole.finished and whole.step >= 4
        lines = [line for line in read_log(folder / "run" / "log.jsonl") if "loss" in line]
        assert all(0 <= line["data_wait"] <= 1 for line in lines) and len(lines) == whole.step
        assert any("rows of my.json, tales.txt" in line for line in said())
        shutil.copytree(folder / "run", folder / "again")
        for step in range(whole.step - 4, whole.step + 1):  # as if it had stopped before them
            shutil.rmtree(folder / "again" / "checkpoints" / str(step))
        again = train(load_preset("p.toml", ["train.output=again", "train.data.max_skipped=0.5"]))
    assert again.step == whole.step
    params = [load_params(run.checkpoint, scanned=True)[1] for run in (whole, again)]
    for name, value in params[0].items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(params[1][name]), name)


def test_a_run_does_not_go_on_with_other_rows(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    with compilation.kept(True):
        train(load_preset("p.toml", ["train.output=short", "train.steps=1"]))
        with (folder / "tales.txt").open("a") as file:
            file.write("The end.\n" * 100)
        with pytest.raises(InfiniteVLError, match="^the source tales had 3 rows and has 8 now"):
            train(load_preset("p.toml", ["train.output=short", "train.steps=1"]))
    (folder / "tales.txt").write_text("Once upon a time.\n" * 30)
