"""Runs with bad data, a bad held-out split or a disk too full for the plot lose no training."""

import json

import pytest
from tiny_run import write_preset

from infinitevl_jax import Processor, compilation
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.train import loop
from infinitevl_jax.train.held_out import HeldOut
from infinitevl_jax.train.log import read_log


@pytest.fixture(scope="module", autouse=True)
def kept_programs():
    """As train.py does: the runs compile one training step between them."""
    with compilation.kept(True):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def preset(folder, tiny_data):
    path = write_preset(folder, tiny_data)
    path.write_text(
        path.read_text().replace("checkpoint_every = 2\n", "")
    )  # as a preset has it that says nothing
    return lambda *changes: load_preset(path, ["train.steps=4", *changes])


def steps(folder):
    return sorted(p.name for p in (folder / "run" / "checkpoints").iterdir())


def test_a_run_goes_on_whatever_it_meets(folder, preset, monkeypatch, said, caplog):
    """Bad data, a held-out split that fails, a full disk, a damaged end: one run, in this order."""
    for stage in (
        _bad_data,
        _the_time_is_over,
        _a_held_out_split_that_fails,
        _a_picture_that_cannot_be_drawn,
    ):
        with monkeypatch.context() as patch:
            stage(folder, preset, patch, said)
        caplog.clear()
    _a_damaged_end(folder, preset, said)


def _bad_data(folder, preset, monkeypatch, said):
    """What a default run learnt is kept."""
    real = loop.train_batches

    class Bad:
        def __init__(self, *arguments):
            self.batches, self.count = real(*arguments), 0

        def __next__(self):
            self.count += 1
            if self.count == 4:
                raise InfiniteVLError("tiny_vqa train row 17: the image is damaged", "mend the row")
            return next(self.batches)

        def __getattr__(self, name):
            return getattr(self.batches, name)

    monkeypatch.setattr(loop, "train_batches", Bad)
    with pytest.raises(InfiniteVLError) as caught:
        loop.train(preset())
    assert caught.value.items == (f"step 3 is saved in {folder / 'run' / 'checkpoints' / '3'}",)
    assert steps(folder) == ["3"] and [
        line["step"] for line in read_log(folder / "run" / "log.jsonl")
    ] == [1, 2, 3]


def _the_time_is_over(folder, preset, monkeypatch, said):
    outcome = loop.train(preset("train.minutes=0"))
    assert (outcome.finished, outcome.step, steps(folder)) == (False, 3, ["3"])
    assert said()[-1].startswith("stopped at step 3 of 4; saved in ")


def _a_held_out_split_that_fails(folder, preset, monkeypatch, said):
    """The end is saved before, and the split is evaluated on the next start."""

    def fails(self, state, stop):
        raise InfiniteVLError(
            "tiny_vqa train[75%:]: 4 of 6 rows cannot be used, 3 may be:",
            "mend them",
            ["row 2: truncated"],
        )

    with monkeypatch.context() as patch, pytest.raises(InfiniteVLError) as caught:
        patch.setattr(HeldOut, "measure", fails)
        loop.train(preset())
    assert "going on from step 3" in said() and steps(folder) == ["3", "4"]
    assert caught.value.items == (
        "row 2: truncated",
        f"step 4 is saved in {folder / 'run' / 'checkpoints' / '4'}",
    )

    def interrupted(self, state, stop):
        stop.asked = True

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "measure", interrupted)
        outcome = loop.train(preset())
    assert (
        not outcome.finished
        and outcome.step == 4
        and said()[-1].startswith("stopped at step 4 of 4; saved in ")
    )


def _a_picture_that_cannot_be_drawn(folder, preset, monkeypatch, said):
    def full(log, picture):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "plot_log", full)
    outcome = loop.train(preset())
    assert outcome.finished and outcome.step == 4 and outcome.checkpoint.name == "4"
    assert (
        said()[-1].startswith(f"done: checkpoint {outcome.checkpoint}, log ")
        and "no plot (OSError" in said()[-1]
    )
    lines = read_log(folder / "run" / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4] and lines[-1]["held_out_rows"] == 16


def _a_damaged_end(folder, preset, said):
    """The newest step is verified first; the previous one reproduces the end."""
    run = folder / "run"
    before = [line for line in read_log(run / "log.jsonl") if line["step"] == 4]
    for path in (run / "checkpoints" / "4" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:20])
    assert loop.train(preset()).finished
    assert (
        "going back to step 3" in said()[0]
        and str(run / "damaged-step-4") in said()[0]
        and (run / "damaged-step-4").is_dir()
    )
    after = [line for line in read_log(run / "log.jsonl") if line["step"] == 4]
    assert [line.get("loss") for line in after] == [line.get("loss") for line in before] and len(
        after
    ) == 2


@pytest.fixture(scope="module")
def ended(tmp_path_factory, tiny_data):
    """The checkpoint at the end of a run."""
    path = write_preset(tmp_path_factory.mktemp("ended"), tiny_data)
    return loop.train(load_preset(path, ["train.steps=2"])).checkpoint


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_pixel_limits_beside_a_checkpoint(ended, tiny_data, tmp_path, file):
    """Covers the cure of the error for large images: training uses the same limits."""
    import shutil

    from infinitevl_jax.config.presets import ModelSource
    from infinitevl_jax.data.sources.tfds import Dataset
    from infinitevl_jax.train.setup import prepare_start

    origin = tmp_path / "origin"
    shutil.copytree(ended, origin)
    settings = json.loads((origin / "preprocessor_config.json").read_text())
    if file == "processor_config.json":
        settings["size"] = {
            "shortest_edge": settings.pop("min_pixels"),
            "longest_edge": settings.pop("max_pixels"),
        }
        (origin / "preprocessor_config.json").unlink()
        (origin / file).write_text(
            json.dumps({"image_processor": settings, "processor_class": "X"})
        )
    source = Dataset("tiny_vqa", tiny_data, "train")
    start = prepare_start(
        ModelSource(from_=str(origin), max_pixels=64), source, tmp_path / "run", 0
    )
    assert start.files == tmp_path / "run" / "model"
    for processor in (start.processor, Processor.from_pretrained(start.files)):
        assert (processor.images.min_pixels, processor.images.max_pixels) == (64, 64)
    assert Processor.from_pretrained(origin).images.max_pixels == 256
    assert (
        prepare_start(ModelSource(from_=str(origin)), source, tmp_path / "run", 0).files == origin
    )
    with pytest.raises(InfiniteVLError, match="min_pixels 512 is above max_pixels 256"):
        prepare_start(ModelSource(from_=str(origin), min_pixels=512), source, tmp_path / "other", 0)
    assert not (tmp_path / "other" / "model").exists()
