"""Presets: accepted and refused values."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.cli import app
from infinitevl_jax.config.model import infinitevl_4b
from infinitevl_jax.config.presets import RENAMED, Preset, differences, load_preset, to_tree
from infinitevl_jax.config.shipped import known_presets
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.train.loop import train
from infinitevl_jax.train.models import common_layout
from infinitevl_jax.train.objectives import objective
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER
from infinitevl_jax.train.optimizer import learning_rate_factors
from infinitevl_jax.train.pods import published_models

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("distill", "layerwise", "long", "supervised")
FULL_SIZE = [f"{way}_{stage}" for way in ("lean", "paper", "released") for stage in STAGES]
SMALL = [f"infinitevl_tiny_{stage}" for stage in sorted((*STAGES, "teacher"))]
SMOLLM2 = [f"smollm2_{stage}" for stage in STAGES]
TINY = ["tiny_distill", "tiny_layerwise", "tiny_teacher", "tiny_tune"]
SHIPPED = ["easy_vqa", *SMALL, *FULL_SIZE, *SMOLLM2, *TINY]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_presets_load_and_say_what_they_are(path):
    preset = load_preset(path)
    assert preset.train.output.startswith("runs/")
    header = path.read_text().split("[")[0]
    assert f"python train.py configs/{path.name}" in header and "expect" in header
    assert ("not run at this size" if path.stem in FULL_SIZE else "minutes") in header


@pytest.mark.parametrize("name", FULL_SIZE)
def test_presets_of_the_4b_model_suit_its_stages(name):
    """The models that they name, without weights: sizes, objective, and what trains."""
    preset = load_preset(name)
    way, stage = name.split("_")
    models = published_models(preset)
    assert models[STUDENT] == infinitevl_4b()
    chosen, options = objective(preset.train.objective.name), preset.train.objective
    assert (preset.teacher is not None) == (TEACHER in models)
    chosen.check(models, options)
    known = parameters(
        models[STUDENT], scanned=common_layout(*models.values()), lora=preset.train.lora
    )
    trained = [
        x for n in learning_rate_factors(known, preset.train.trainable) for x in known[n].layers
    ]
    assert all(chosen.reached(x, models[STUDENT], options) for x in trained)
    parts = {re.sub(r"layers\.\d+\.(\w+)\..*", r"\1", x) for x in trained}
    layers = {int(x.split(".")[1]) for x in trained if x.startswith("layers.")}
    windows = {i for i in range(36) if i % 4 == 0}
    if stage == "layerwise" or (stage == "distill" and way != "lean"):
        assert parts == {"self_attn"} and layers == set(range(36)) - windows
    elif way == "lean" and stage != "long":
        assert parts == {
            "self_attn",
            "mlp",
            "input_layernorm",
            "post_attention_layernorm",
            "norm.weight",
        }
    else:
        assert (
            parts == {"self_attn"}
            if (way, stage) == ("released", "supervised")
            else {"self_attn", "mlp"}
        )
    if stage != "long":
        assert layers >= set(range(36)) - windows
    before = {"distill": "layerwise", "supervised": "distill", "long": "supervised"}.get(stage)
    if before:  # the chain of stages
        assert preset.model.from_ == load_preset(f"{way}_{before}").train.output


def test_a_preset_without_its_folders_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", "lean_long"])
    assert done.exit_code == 2 and "data/instructions.json does not exist" in done.output
    (tmp_path / "data" / "images").mkdir(parents=True)
    row = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    (tmp_path / "data" / "captions.json").write_text(json.dumps([row] * 200))
    for stage, culprit in (
        ("distill", "'runs/lean/layerwise', which is no folder"),
        ("layerwise", "'Qwen2.5-VL-3B-Instruct', which is no folder"),
        ("distill", "'runs/lean/layerwise', a run that has no checkpoint yet"),
    ):
        with pytest.raises(InfiniteVLError, match=f"model.from is {culprit}"):
            train(load_preset(f"lean_{stage}"))


def test_shipped_presets_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_preset("easy_vqa") == load_preset(ROOT / "configs" / "easy_vqa.toml")
    assert known_presets() == SHIPPED
    with pytest.raises(InfiniteVLError) as caught:
        load_preset("easy_vqb")
    assert "easy_vqb" in caught.value.culprit and "easy_vqa" in caught.value.cure
    minimal(tmp_path).rename(tmp_path / "easy_vqa")  # a file of this name comes first
    assert load_preset("easy_vqa").model.from_ == "somewhere"
    (tmp_path / "configs").mkdir()
    minimal(tmp_path).rename(tmp_path / "configs" / "mine.toml")
    assert known_presets() == ["configs/mine.toml", *SHIPPED]


def minimal(tmp_path, text=""):
    path = tmp_path / "p.toml"
    path.write_text('[model]\nfrom = "somewhere"\n' + text)
    return path


def test_values_and_overrides(tmp_path):
    path = minimal(tmp_path, "[train.optimizer]\npeak_lr = 1\n")
    changes = [
        "train.optimizer.weight_decay=0",
        "run.tensor=2",
        "train.output=a/b c",
        'train.trainable=["layers.*"]',
    ]
    changes += ["train.data.batch=64"]
    preset = load_preset(path, changes)
    assert isinstance(preset, Preset) and preset.model.from_ == "somewhere"
    assert preset.train.optimizer.peak_lr == 1.0 and isinstance(
        preset.train.optimizer.peak_lr, float
    )
    assert (preset.run.tensor, preset.train.output, preset.train.trainable) == (
        2,
        "a/b c",
        ("layers.*",),
    )
    assert preset.train.data.batch == 64
    assert preset.train.optimizer.beta2 == 0.999  # the default


def test_implementations_of_operators(tmp_path):
    text = '[run]\nops = {attention = "mosaic_gpu,xla", gated_delta_rule = "xla"}\n'
    ops = load_preset(
        minimal(tmp_path, text), ["run.ops.attention=xla", "run.ops.short_conv=mosaic_tpu"]
    ).run.ops
    assert (ops.attention, ops.gated_delta_rule, ops.short_conv, ops.attention_step) == (
        "xla",
        "xla",
        "mosaic_tpu",
        None,
    )
    with pytest.raises(
        InfiniteVLError, match="unknown key 'run.ops.atention'\n  -> did you mean run.ops.attention"
    ):
        load_preset(minimal(tmp_path), ["run.ops.atention=xla"])


@pytest.mark.parametrize("old", RENAMED)
def test_keys_of_earlier_presets_name_the_new_key(tmp_path, old):
    table, key = old.rsplit(".", 1)
    for path, changes in (
        (minimal(tmp_path), [f"{old}=xla"]),
        (minimal(tmp_path, f'[{table}]\n{key} = "xla"\n'), []),
    ):
        with pytest.raises(
            InfiniteVLError, match=f"{old} has a new name\n  -> write {RENAMED[old]}$"
        ):
            load_preset(path, changes)
    assert load_preset(minimal(tmp_path), [f"{RENAMED[old]}=xla"])


def test_differences_name_the_keys(tmp_path):
    old, new = (
        load_preset(minimal(tmp_path)),
        load_preset(minimal(tmp_path), ["train.optimizer.peak_lr=1e-3", "train.seed=3"]),
    )
    assert differences(to_tree(old), to_tree(old)) == []
    assert differences(to_tree(old), to_tree(new)) == [
        "train.optimizer.peak_lr: 5e-05 there, 0.001 now",
        "train.seed: 0 there, 3 now",
    ]


@pytest.mark.parametrize(
    "line",
    ["a." * 100_000 + "b = 1", "x = {" + "a." * 5000 + "b = 1}", '"\\u2028".' * 300 + "b = 1"],
)
def test_a_key_of_very_many_parts_is_refused_at_once(tmp_path, line):
    with pytest.raises(InfiniteVLError, match="more than 200 dots"):
        load_preset(minimal(tmp_path, line + "\n"))
    with pytest.raises(InfiniteVLError):
        load_preset(minimal(tmp_path), [f"train.output={{{line}}}"])
