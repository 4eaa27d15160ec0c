"""A run's folder: one run at a time, one configuration, no silent loss."""

import json
import os
from pathlib import Path

import pytest

from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.train import loop
from infinitevl_jax.train.folder import claim_folder


@pytest.fixture
def preset(tmp_path):
    def make(output, *changes):
        (tmp_path / "p.toml").write_text('[model]\nfrom = "somewhere"\n')
        return load_preset(tmp_path / "p.toml", [f"train.output='{output}'", *changes])

    return make


def claim(preset):
    run, lock = claim_folder(preset)
    lock.close()
    return run


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["run", "link", "run/../run"])
def test_two_runs_never_share_a_folder(preset, tmp_path, name):
    """Also for another seed and another name of the folder. The refused run changes nothing."""
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "run").mkdir()
    run, lock = claim_folder(preset(tmp_path / "run"))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    (run / "log.jsonl").write_text('{"step": 1}\n')
    before = content(run)
    with pytest.raises(InfiniteVLError) as caught:
        loop.train(preset(tmp_path / name, "train.seed=1"))
    assert f"in use by process {os.getpid()} on" in caught.value.culprit and content(run) == before
    lock.close()
    claim(preset(tmp_path / name, "train.seed=1"))
    assert json.loads((run / "preset.json").read_text())["train"]["seed"] == 1


def test_a_refused_run_lets_go(preset, tmp_path):
    run = claim(preset(tmp_path / "run"))
    (run / "checkpoints" / "3").mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(InfiniteVLError, match="holds a run of another configuration") as caught:
            claim(preset(tmp_path / "run", "train.seed=1"))
    assert caught.value.items == ("train.seed: 0 there, 1 now",)
    claim(
        preset(
            tmp_path / "run",
            "train.keep=7",
            "train.checkpoint_minutes=5",
            "train.data.max_skipped=0.5",
        )
    )  # these may change


def test_a_run_of_an_earlier_version_is_refused(preset, tmp_path):
    """Its place in the data was counted differently."""
    run = claim(preset(tmp_path / "run"))
    (run / "checkpoints" / "3").mkdir(parents=True)
    stored = json.loads((run / "preset.json").read_text())
    stored["train"]["data"] = {"name": "easy_vqa", "balance": 0.5, "opening": "", "batch": 16}
    (run / "preset.json").write_text(json.dumps(stored))
    with pytest.raises(InfiniteVLError, match="a run of an earlier version") as caught:
        claim(preset(tmp_path / "run"))
    assert f"model.from={run / 'checkpoints' / '3'}" in caught.value.cure


def test_folders_of_data_and_workers_may_change(preset, tmp_path):
    mixture = "train.data.sources={a={path='a.json',images='x'}}"
    run = claim(preset(tmp_path / "run", mixture))
    (run / "checkpoints" / "3").mkdir(parents=True)
    claim(
        preset(
            tmp_path / "run",
            mixture,
            "train.data.sources.a.images=y",
            "train.data.sources.a.folder=z",
            "train.data.workers=4",
        )
    )
    with pytest.raises(InfiniteVLError, match="another configuration") as caught:
        claim(preset(tmp_path / "run", mixture, "train.data.sources.a.weight=2"))
    assert caught.value.items[0].startswith("train.data.sources.a.images") or any(
        item.startswith("train.data.sources.a.weight: 1.0 there, 2.0 now")
        for item in caught.value.items
    )


def test_a_lost_run_s_log_is_kept(preset, tmp_path, said):
    for number in (1, 2):
        run = claim(preset(tmp_path / "run"))
        (run / "log.jsonl").write_text(f'{{"step": {number}}}\n')
        claim(preset(run))
        assert said()[number - 1 :] == [
            "a run that left no checkpoint was here: its log is kept as"
            f" {run / f'log.{number}.jsonl'}"
        ]
        assert (run / f"log.{number}.jsonl").read_text() == f'{{"step": {number}}}\n' and not (
            run / "log.jsonl"
        ).exists()


def test_what_a_killed_process_left_is_removed(preset, tmp_path):
    run = claim(preset(tmp_path / "run"))
    (run / ".model.partial-x1").mkdir()
    (run / ".preset.json.partial").write_text("{")
    claim(preset(run))
    assert sorted(os.listdir(run)) == [".lock", "preset.json"]


DAMAGED = [
    b"",
    b"[]",
    b"3",
    b'{"model"',
    b"\xff\xfe",
    b"null",
    b"[" * 100_000,
    b'"' + b"x" * 5000 + b'"',
]


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_preset_is_named_and_its_cure_works(preset, tmp_path, text, said):
    run = claim(preset(tmp_path / "run"))
    for step in ("2", "4"):
        (run / "checkpoints" / step).mkdir(parents=True)
    (run / "preset.json").write_bytes(text)
    with pytest.raises(InfiniteVLError) as caught:
        claim(preset(run))
    assert str(run / "preset.json") in caught.value.culprit
    assert caught.value.cure.startswith(
        "remove it to go on from step 4 with the configuration that is given"
    )
    assert len(str(caught.value)) < 1600
    (run / "preset.json").unlink()
    claim(preset(run))
    assert said() == [f"{run} has no preset.json: taken for a run of this configuration"]
    assert json.loads((run / "preset.json").read_text())["model"] == {
        "from": "somewhere",
        "tokenizer": "words",
        "initializer_range": 0.02,
    }


def test_stored_values_of_other_types_are_differences(preset, tmp_path):
    run = claim(preset(tmp_path / "run"))
    (run / "checkpoints" / "2").mkdir(parents=True)
    stored = json.loads((run / "preset.json").read_text())
    (run / "preset.json").write_text(
        json.dumps(stored | {"train": [1], "run": None, "x": {"y": 1}})
    )
    with pytest.raises(InfiniteVLError, match="another configuration"):
        claim(preset(run))


OUTPUTS = {
    "below a file": lambda root: root / "file" / "run",
    "a file": lambda root: root / "file",
    "a link to nowhere": lambda root: root / "nowhere",
    "a link to itself": lambda root: root / "loop",
    "a name too long": lambda root: root / ("a" * 300),
    "a path too long": lambda root: Path("/".join(["a" * 200] * 21)[:4096]),
    "a device": lambda root: Path("/dev/null"),
    "where nothing can be written": lambda root: Path("/proc/x"),
    "somebody's folder": lambda root: root / "mine",
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs_that_cannot_be(preset, tmp_path, case):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    (tmp_path / "nowhere").symlink_to("gone/further")
    (tmp_path / "loop").symlink_to("loop")
    chosen = preset(OUTPUTS[case](tmp_path))
    before = content(tmp_path)
    with pytest.raises(InfiniteVLError) as caught:
        loop.train(chosen)
    assert (
        str(OUTPUTS[case](tmp_path))[:100] in caught.value.culprit and len(str(caught.value)) < 5000
    )
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")]
)
def test_a_disk_that_fails(preset, tmp_path, monkeypatch, error):
    with monkeypatch.context() as patch, pytest.raises(InfiniteVLError, match="preset.json"):
        patch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(error))
        claim(preset(tmp_path / "run"))
    claim(preset(tmp_path / "run"))
