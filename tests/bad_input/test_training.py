"""Invalid presets, data, meshes and folders give one error and leave nothing behind."""

import json
import shutil

import pytest
from tiny_run import PRESET, write_preset

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.config.presets import ModelSource, load_preset
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.sharding import make_mesh
from infinitevl_jax.train.loop import train


def refuses(action, *culprits):
    with pytest.raises(InfiniteVLError) as caught:
        action()
    message = str(caught.value)
    assert all(culprit in message for culprit in culprits), message
    assert message.count("\n") < 15 and len(message) < 1600 and "->" in message, message


# presets

PRESETS = {
    "unknown key": (
        ("peak_lr = 1e-3", "peek_lr = 1e-3"),
        "train.optimizer.peek_lr",
        "train.optimizer.peak_lr",
    ),
    "key of another section": (
        ("[train]", "[train]\npeak_lr = 1"),
        "'train.peak_lr'",
        "train.optimizer.peak_lr",
    ),
    "unknown section": (("[train.data]", "[train.dota]"), "'train.dota'", "train.data"),
    "unknown size": (
        ("hidden_size = 32", "hiden_size = 32"),
        "model.text.hiden_size",
        "model.text.hidden_size",
    ),
    "text for a number": (("steps = 6", 'steps = "six"'), "train.steps", "'six'", "whole number"),
    "fraction for a count": (
        ("batch = 8", "batch = 8.5"),
        "train.data.batch",
        "8.5",
        "whole number",
    ),
    "true for a count": (("batch = 8", "batch = true"), "train.data.batch", "True"),
    "number for text": (('name = "tiny_vqa"', "name = 3"), "train.data.name", "give a text"),
    "number for a list": (("steps = 6", "trainable = 3"), "train.trainable", "list"),
    "value for a table": (
        ("[train.optimizer]\npeak_lr = 1e-3", "[train.data.optimizer]"),
        "train.data.optimizer",
    ),
    "missing key": (("layer_types = ", "rope_theta = 1e4 # "), "model.text.layer_types", "missing"),
    "unknown layer type": (
        ('["sliding_attention", "lin', '["slide", "lin'),
        "slide",
        "linear_attention",
    ),
    "rotary sections": (("[2, 1, 1]", "[2, 2, 2]"), "mrope_section", "head_dim"),
    "negative learning rate": (("peak_lr = 1e-3", "peak_lr = -1"), "train.optimizer.peak_lr", "-1"),
    "no learning rate": (("peak_lr = 1e-3", "peak_lr = 0"), "peak_lr", "nothing would train"),
    "beta over one": (("peak_lr = 1e-3", "beta2 = 1.5"), "beta2", "1.5"),
    "no length of training": (("steps = 6", "epochs = 0"), "train.steps", "epochs"),
    "broken expression": (
        ("steps = 6", 'trainable = ["layers.(*"]'),
        "layers.(*",
        "regular expression",
    ),
    "unknown precision": (("fsdp = 1", 'fsdp = 1\ndtype = "float8"'), "float8", "bfloat16"),
    "unknown remat": (("fsdp = 1", 'fsdp = 1\nremat = "some"'), "'some'", "dots"),
    "context axis": (("fsdp = 1", "fsdp = 1\ncontext = 2"), "run.context", "reserved"),
    "two open axes": (("fsdp = 1", "fsdp = -1\ntensor = -1"), "-1", "one axis"),
    "empty axis": (("fsdp = 1", "fsdp = 0"), "run.fsdp", "0"),
    "folder and sizes": (("[model]\n", '[model]\nfrom = "there"\n'), "model.from", "model.text"),
    "broken TOML": (("[train]", "[train"), "tiny.toml", "TOML"),
}


@pytest.mark.parametrize("case", PRESETS)
def test_presets(case, tmp_path):
    (old, new), *culprits = PRESETS[case]
    assert old in PRESET
    path = tmp_path / "tiny.toml"
    path.write_text(PRESET.replace(old, new))
    refuses(lambda: load_preset(path), "tiny.toml", *culprits)


OVERRIDES = {
    "train.optimizer.peak_ir=1": ("train.optimizer.peak_ir", "peak_lr"),
    "optimizer.peak_lr=1": ("'optimizer'",),
    "train.steps=many": ("train.steps", "many"),
    "train.steps": ("train.steps", "key=value"),
    "=3": ("=3", "key=value"),
    "train.steps.more=1": ("train.steps.more=1",),
}


@pytest.mark.parametrize("change", OVERRIDES)
def test_changes(change, tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(PRESET)
    refuses(lambda: load_preset(path, [change]), *OVERRIDES[change])


def test_no_such_preset(tmp_path):
    refuses(lambda: load_preset(tmp_path / "nowhere.toml"), "nowhere.toml")


# meshes


def test_mesh_larger_than_the_machine():
    refuses(
        lambda: make_mesh(RunConfig(fsdp=16, tensor=2)),
        "fsdp 16",
        "tensor 2",
        "32 devices",
        "8 cpu devices",
    )


def test_mesh_that_does_not_divide_the_machine():
    refuses(
        lambda: make_mesh(RunConfig(tensor=3)), "tensor 3", "8 cpu devices", "not a multiple of 3"
    )


# runs


@pytest.fixture
def attempt(tmp_path, tiny_data):
    """Train the tiny preset with changes."""
    path = write_preset(tmp_path, tiny_data)
    return lambda *changes: train(load_preset(path, changes))


RUNS = {
    "train.data.name=tiny_vqb": ("tiny_vqb", "easy_vqa"),
    "train.data.train=learn": ("'learn'", "train (24 rows)"),
    "train.data.train='train[:0%]'": ("'train[:0%]'", "no rows"),
    "model.vision.out_hidden_size=24": ("24", "32"),
    "train.data.batch=20": ("18 rows", "20", "train.data.batch"),
    "train.data.prefix_length=4": ("prefix", "train.data.prefix_length=6"),
    "train.data.length=4": ("train.data.length",),
    "train.trainable=[]": ("train.trainable", "empty"),
    "train.trainable=['decoder.*']": ("'decoder.*'", "matches no parameter", "layers."),
    "train.data.options.opening='(shape'": ("train.data.options.opening", "(shape"),
    "train.data.options.balance=-1": ("balance", "-1", "opening, opening_steps, balance"),
    "train.data.options.blance=1": ("blance", "opening, opening_steps, balance"),
    "model.tokenizer=nowhere": ("nowhere", "no folder"),
}


@pytest.mark.parametrize("change", RUNS)
def test_runs(change, attempt):
    refuses(lambda: attempt(change, "train.data.held_out=''"), *RUNS[change])


def test_a_run_that_never_began_makes_way(attempt, tmp_path):
    refuses(lambda: attempt("train.trainable=['decoder.*']"), "matches no parameter")
    assert (tmp_path / "run" / "preset.json").exists()
    refuses(
        lambda: attempt("train.trainable=['encoder.*']"), "'encoder.*'", "matches no parameter"
    )  # not: another configuration


def test_batch_that_does_not_divide(attempt):
    refuses(
        lambda: attempt("run.fsdp=8", "train.data.batch=6", "train.steps=1"),
        "6 rows",
        "data x fsdp = 8",
        "train.data.batch",
    )


def test_packed_conversation_that_never_fits(attempt):
    changes = (
        "train.data.questions=0",
        "train.data.patches=64",
        "train.data.length=12",
        "train.steps=1",
    )
    refuses(lambda: attempt(*changes), "tokens", "train.data.length is 12")


def test_checkpoint_folder_that_is_not_there(tmp_path, tiny_data):
    path = write_preset(tmp_path, tiny_data)
    text = path.read_text()
    path.write_text('[model]\nfrom = "nowhere"\n' + text[text.index("[run]") :])
    refuses(lambda: train(load_preset(path)), "nowhere")


def test_output_that_is_something_else(tmp_path, attempt):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    refuses(attempt, str(tmp_path / "run"), "not the folder of a run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_output_that_is_a_file(tmp_path, attempt):
    (tmp_path / "run").write_text("mine")
    refuses(attempt, "not the folder of a run")
    assert (tmp_path / "run").read_text() == "mine"


# going on


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    """A run of one step."""
    folder = tmp_path_factory.mktemp("trained")
    train(load_preset(write_preset(folder, tiny_data), ["train.steps=1", "train.data.held_out=''"]))
    return folder / "run"


@pytest.fixture
def going_on(trained, tmp_path, tiny_data):
    """Resume a copy of that run."""
    shutil.copytree(trained, tmp_path / "run")
    path = write_preset(tmp_path, tiny_data)
    return lambda *changes: train(
        load_preset(path, ["train.steps=1", "train.data.held_out=''", *changes])
    )


def test_run_of_another_configuration(going_on, tmp_path):
    before = (tmp_path / "run" / "preset.json").read_text()
    refuses(
        lambda: going_on(
            "train.optimizer.peak_lr=0.5",
            "model.text.hidden_size=64",
            "model.vision.out_hidden_size=64",
        ),
        "train.optimizer.peak_lr: 0.001 there, 0.5 now",
        "model.text.hidden_size: 32 there, 64 now",
        "train.output",
    )
    assert (tmp_path / "run" / "preset.json").read_text() == before


def test_how_a_run_is_carried_out_may_change(going_on, tmp_path):
    """Also for runs older than the key."""
    path = tmp_path / "run" / "preset.json"
    preset = json.loads(path.read_text())
    del preset["run"]["scan"]
    path.write_text(json.dumps(preset))
    assert going_on("run.scan=false", "run.remat=dots").finished


def test_checkpoint_of_another_model(going_on, tmp_path):
    """A modified preset or a copied checkpoint is detected by the tensors."""
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    (tmp_path / "run" / "model" / "config.json").write_text(
        json.dumps(config | {"intermediate_size": 64})
    )
    refuses(
        going_on,
        "layers.0.mlp.gate_proj.kernel",
        "(32, 48)",
        "(32, 64)",
        "another configuration",
    )


def test_checkpoint_of_another_optimiser(going_on, tmp_path):
    preset = json.loads((tmp_path / "run" / "preset.json").read_text())
    preset["train"]["trainable"] = ["layers.*"]
    (tmp_path / "run" / "preset.json").write_text(json.dumps(preset))
    refuses(
        lambda: going_on("train.trainable=['layers.*']"),
        str(tmp_path / "run" / "checkpoints" / "1"),
    )


def test_damaged_checkpoint(going_on, tmp_path):
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "1" / "params")
    refuses(going_on, str(tmp_path / "run" / "checkpoints" / "1"))


@pytest.mark.parametrize("key, value", [("tokenizer", "there"), ("initializer_range", 0.5)])
def test_what_a_checkpoint_folder_decides_cannot_be_given_beside_it(key, value):
    refuses(lambda: ModelSource(from_="checkpoint", **{key: value}), "model.from", f"model.{key}")
