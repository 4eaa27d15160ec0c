"""A LoRA run from end to end: resuming, serving, exports, and going on from an adapter."""

import json
import shutil
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tiny_folder import tiny_config, tiny_model, write_folder
from transformers import AutoModelForCausalLM, dynamic_module_utils

from infinitevl_jax import InfiniteVL, compilation
from infinitevl_jax.checkpoints import (
    export_adapter,
    export_folder,
    import_folder,
    load_params,
    read_config,
    save_params,
)
from infinitevl_jax.checkpoints.adapter_folder import load_adapter
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.stored import open_arrays
from infinitevl_jax.cli import info
from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import LINEAR, SLIDING
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.lora import is_adapter
from infinitevl_jax.nn.params import functional, parameters
from infinitevl_jax.sharding import make_mesh, parameter_shardings
from infinitevl_jax.train.log import read_log
from infinitevl_jax.train.loop import train
from pallas_kernels.testing.parity import rel_rms

TARGETS = r"layers\..*\.(q|k|v|g|o|gate|up|down)_proj"
PRESET = """\
[model]
from = "base"

[run]
fsdp = 1

[train]
output = "run"
steps = 4
log_every = 1
checkpoint_every = 2

[train.lora]
rank = 3
alpha = 6

[train.data]
path = "my.json"
images = "photos"
train = "train[:90%]"
held_out = "train[90%:]"
batch = 2
length = 128
patches = 64

[train.optimizer]
peak_lr = 3e-2
warmup = 0.0
"""
LORA = LoraConfig(rank=3, alpha=6)
TOKENS = np.random.default_rng(0).integers(1, 250, (1, 40))


@pytest.fixture(scope="module", autouse=True)
def kept_programs():
    with compilation.kept(True):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a user has, an imported Hugging Face checkpoint `base` and a LLaVA-style JSON with a
    folder of pictures; and a finished run in `run`."""
    folder = tmp_path_factory.mktemp("lora")
    write_folder(folder / "made", tiny_model(tiny_config(layer_types=(SLIDING, LINEAR) * 2)))
    export_folder(folder / "made", folder / "hf")
    import_folder(folder / "hf", folder / "base")
    (folder / "photos").mkdir()
    rows = []
    for i in range(20):
        Image.new("RGB", (12, 12), (12 * i, 30, 30)).save(folder / "photos" / f"{i}.png")
        said = [{"from": "human", "value": "<image>\nHow red?"}, {"from": "gpt", "value": f"{i}."}]
        rows.append({"image": f"{i}.png", "conversations": said})
    (folder / "my.json").write_text(json.dumps(rows))
    (folder / "p.toml").write_text(PRESET)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(load_preset("p.toml")).finished
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Trains with changes."""
    monkeypatch.chdir(folder)
    return lambda *changes: train(load_preset("p.toml", ["train.data.held_out=''", *changes]))


def stored(folder):
    reader = open_arrays(folder)
    return {name: reader.read(name) for name in reader.shapes}


def unmerged(step):
    """Logits of a step's weights with its adapters beside them."""
    config = read_config(step)
    model = functional(config, scanned=False, lora=LORA)(
        {name: jnp.asarray(value) for name, value in stored(step).items()}
    )
    inputs = build_inputs(config, TOKENS).decoder
    return np.asarray(model.logits(model.decode(model.embed(inputs, None), inputs)[0]))


def logits(folder):
    return np.asarray(InfiniteVL.from_pretrained(folder)(TOKENS).logits)


def test_adapters_train_and_the_base_keeps_its_bits(folder):
    base, found = stored(folder / "base"), stored(folder / "run" / "checkpoints" / "4")
    adapters = {name for name in found if is_adapter(name)}
    assert found.keys() - adapters == base.keys() and len(adapters) == 2 * (2 * 7 + 2 * 8)
    for name, value in base.items():
        assert found[name].tobytes() == value.tobytes() and found[name].dtype == value.dtype
    assert all(np.any(found[name]) and found[name].dtype == np.float32 for name in adapters)
    lines = [x for x in read_log(folder / "run" / "log.jsonl") if "loss" in x]
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["step"] == 4
    assert np.isfinite(read_log(folder / "run" / "log.jsonl")[-1]["held_out_loss"])


def test_it_goes_on_to_the_same_bits(folder, run):
    """Beside a base in bfloat16, which stays it."""
    model = tiny_model(tiny_config(layer_types=(SLIDING, LINEAR) * 2))
    halves = {name: value.astype(jnp.bfloat16) for name, value in model.params.items()}
    side = {"side_files_from": folder / "made-side"}
    save_params(folder / "halves", halves, model.config, **side)
    run("model.from=halves", "train.output=first")
    shutil.copytree(folder / "first", folder / "again")
    shutil.rmtree(folder / "again" / "checkpoints" / "4")
    assert run("model.from=halves", "train.output=again").step == 4
    first, second = (stored(folder / name / "checkpoints" / "4") for name in ("first", "again"))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name
        assert value.dtype == (jnp.float32 if is_adapter(name) else jnp.bfloat16)
    with pytest.raises(InfiniteVLError) as caught:
        run("model.from=halves", "train.output=again", "train.lora.rank=4")
    assert [item.split(":")[0] for item in caught.value.items] == ["train.lora.rank"]


def test_a_step_serves_merged(folder):
    step = folder / "run" / "checkpoints" / "4"
    whole, merged = unmerged(step), logits(step)
    assert rel_rms(merged, whole) <= 1e-5
    assert rel_rms(logits(folder / "base"), whole) > 0.01
    facts = info.describe(step)
    assert "with LoRA of rank 3" in facts["kind"]
    assert facts["parameters"] == info.describe(folder / "base")["parameters"]
    # a device reads its part of the sum only
    config, mesh = read_config(step), make_mesh(RunConfig(fsdp=4, tensor=2))
    places = parameter_shardings(parameters(config, scanned=True), mesh)
    spread, alone = (
        load_params(step, scanned=True, shardings=where)[1] for where in (places, None)
    )
    for name, value in alone.items():
        np.testing.assert_allclose(spread[name], value, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # of transformers and peft
def test_exports_open_in_transformers_and_peft(folder, tmp_path, monkeypatch):
    """The merged folder, and the adapter on the exported base."""
    import peft  # 6 seconds, which every worker would spend on collecting this file

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    step = folder / "run" / "checkpoints" / "4"
    export_folder(step, tmp_path / "merged")
    export_folder(folder / "base", tmp_path / "base")
    found = export_adapter(step, tmp_path / "adapter")
    assert (found.rank, found.alpha, found.base_trained) == (3, 6, False)
    options = {"trust_remote_code": True, "dtype": torch.float32}

    @torch.no_grad()
    def theirs(model):
        return model(input_ids=torch.tensor(TOKENS)).logits.numpy()

    merged = theirs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **options))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    plain = theirs(base)
    adapted = theirs(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    whole = unmerged(step)
    assert rel_rms(adapted, whole) <= 1e-5 and rel_rms(merged, whole) <= 1e-5
    assert rel_rms(plain, whole) > 0.01
    import_folder(tmp_path / "base", tmp_path / "ours", adapters=[tmp_path / "adapter"])
    assert rel_rms(logits(tmp_path / "ours"), whole) <= 1e-5
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_names_follow_the_code_of_the_source(folder, tmp_path):
    step = shutil.copytree(folder / "run" / "checkpoints" / "4", tmp_path / "4")
    for file in step.glob("*.py"):
        file.unlink()
    (step / "modeling_infinitevl.py").write_text("self.language_model = Decoder(config)")
    export_adapter(step, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    start = "base_model.model.model.language_model.layers."
    assert names and all(name.startswith(start) for name in names)


def test_going_on_from_the_adapter(folder, run):
    step = folder / "run" / "checkpoints" / "4"
    export_adapter(step, folder / "adapter")
    done = run("train.output=longer", "train.lora.from=adapter", "train.optimizer.peak_lr=1e-12")
    first, after = stored(step), stored(done.checkpoint)
    for name, value in first.items():
        np.testing.assert_allclose(after[name], value, rtol=0, atol=1e-9)
    config = read_config(step)
    known = parameters(config, scanned=False, lora=LORA)
    lora = LoraConfig(rank=3, alpha=6, from_=str(folder / "adapter"))
    places = parameter_shardings(known, make_mesh(RunConfig(fsdp=4, tensor=2)))
    for name, value in load_adapter(lora, config, known, places).items():
        np.testing.assert_array_equal(value, first[name])


@pytest.mark.parametrize(
    ("changes", "edit", "culprit"),
    [
        (["train.lora.rank=4", "train.lora.alpha=8"], {}, "has rank 3 and scale 2, train.lora"),
        (["train.lora.use_rslora=true"], {}, "train.lora gives 3 and 3.46"),
        ([r"train.lora.targets=['layers\..*\.q_proj']"], {}, "only the adapter has"),
        ([], {"lora_dropout": 0.1}, "lora_dropout is 0.1"),
        ([], {"use_dora": True}, "use_dora is True"),
        (["train.lora.from=none"], {}, "train.lora.from is 'none', which is no folder"),
    ],
)
def test_what_cannot_be_gone_on_from(folder, run, tmp_path, changes, edit, culprit):
    adapter = tmp_path / "adapter"
    export_adapter(folder / "run" / "checkpoints" / "4", adapter)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(InfiniteVLError, match=culprit):
        run(f"train.output={tmp_path / 'no'}", f"train.lora.from={adapter}", *changes)


def test_other_weights_may_train_too(folder, run, tmp_path):
    trainable = r"train.trainable=['.*\.lora_[ab]', 'layers\..*norm\.weight']"
    step = run("train.output=both", trainable, "train.steps=1").checkpoint
    base, found = stored(folder / "base"), stored(step)
    moved = {name for name in base if base[name].tobytes() != found[name].tobytes()}
    assert moved and all("norm" in name for name in moved)
    assert export_adapter(step, tmp_path / "adapter").base_trained
    export_folder(step, tmp_path / "base", merge=False)
    import_folder(tmp_path / "base", tmp_path / "ours", adapters=[tmp_path / "adapter"])
    assert rel_rms(logits(tmp_path / "ours"), unmerged(step)) <= 1e-5
    with pytest.raises(InfiniteVLError, match=r"does not match layers.0.*which train.lora adds"):
        run("train.output=neither", r"train.trainable=['layers\..*norm\.weight']")


def test_the_next_stage_begins_with_merged_weights(folder, run):
    """Of a run whose checkpoints hold no adapter."""
    step = folder / "run" / "checkpoints" / "4"
    (folder / "next.toml").write_text(
        PRESET.replace("[train.lora]\nrank = 3\nalpha = 6\n", "").replace('"base"', '"run"')
    )
    changes = ["train.output=next", "train.steps=1", "train.optimizer.peak_lr=1e-12"]
    after = train(load_preset("next.toml", changes)).checkpoint
    assert Manifest.read(step).lora and Manifest.read(after).lora is None
    assert rel_rms(logits(after), logits(step)) <= 1e-6


def test_a_run_without_an_adapter_has_none_to_export(folder, tmp_path):
    with pytest.raises(InfiniteVLError, match="has no adapter"):
        export_adapter(folder / "base", tmp_path / "adapter")
    assert "lora" not in (folder / "base" / "infinitevl_jax.json").read_text()
