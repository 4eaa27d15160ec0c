"""The stages of infinitevl-tiny with a teacher of one layer: resumed, evaluated, packaged."""

import json
import sys

import pytest
from tiny_folder import tiny_config, tiny_model, write_folder

from benchmarks.training import package_model, tiny_vlm
from infinitevl_jax import InfiniteVL, InfiniteVLError, Processor
from infinitevl_jax.checkpoints import load_params, read_config
from infinitevl_jax.config.model import LINEAR, SLIDING
from infinitevl_jax.config.presets import load_preset

SOURCES = (
    '{words={kind="drawn",options={task="words",rows=40}},'
    'recall={kind="drawn",options={task="recall",rows=40,frames=3}}}'
)
QUESTIONS = (
    '{words={kind="drawn",held_out="test[:3]",options={task="words",rows=9}},'
    'recall={kind="drawn",held_out="test[:2]",options={task="recall",rows=9,ago=1}}}'
)
SMALL = [
    f"train.data.sources={SOURCES}",
    f"questions:train.data.sources={QUESTIONS}",
    *("run.dtype=float32", "run.fsdp=1", "train.steps=2", "train.log_every=1"),
    *("train.data.batch=2", "train.data.length=64", "train.data.patches=64"),
    "train.data.workers=0",
    'teacher:model.text={layer_types=["full_attention"],vocab_size=400,'
    "hidden_size=16,intermediate_size=16,num_attention_heads=2,num_key_value_heads=2,head_dim=8,"
    "mrope_section=[2,1,1]}",
    "teacher:model.vision={depth=1,hidden_size=16,intermediate_size=16,num_heads=2,patch_size=8,"
    "temporal_patch_size=1,window_size=16,fullatt_block_indexes=[0],out_hidden_size=16}",
    "teacher:model.max_pixels=1024",
    *("layerwise:model.mixers.linear_head_dim=8", "layerwise:model.mixers.sliding_window=8"),
    "layerwise:model.mixers.initialise.tokens=200",
    "long:train.lora.rank=2",
]


def run(out, monkeypatch, *more):
    arguments = ["tiny_vlm", str(out), *SMALL, "--variants", "window", *more]
    monkeypatch.setattr(sys, "argv", arguments)
    tiny_vlm.main()
    return tiny_vlm.Job(out, tiny_vlm.Changes(), 0).results()


def test_all_stages_evaluation_and_package(tmp_path, monkeypatch, capsys):
    assert run(tmp_path, monkeypatch, "--minutes", "0") == []
    assert "not finished" in capsys.readouterr().out
    (line,) = run(tmp_path, monkeypatch)
    stages = tmp_path / "seed_0" / "window"
    assert (line["seed"], line["variant"]) == (0, "window")
    assert {name: found["questions"] for name, found in line["tasks"].items()} == {
        "words": 3,
        "recall": 2,
    }
    for stage in tiny_vlm.STAGES:
        log = (stages / stage / "log.jsonl").read_text().splitlines()
        assert [json.loads(entry)["step"] for entry in log] == [1, 2]
        assert read_config(stages / stage / "checkpoints" / "2").text.layer_types == (SLIDING,)
    assert "| recall |" in (tmp_path / "table.md").read_text()
    assert (stages / "figures" / "samples.png").exists()
    assert run(tmp_path, monkeypatch) == [line]  # nothing is left to do
    size = package_model.package(stages / "long", tmp_path / "package")
    model = InfiniteVL.from_pretrained(tmp_path / "package")
    assert model.dtype == "bfloat16" and size < 500_000
    processor = Processor.from_pretrained(tmp_path / "package")
    assert processor.decode(processor.tokenizer.encode("what costs 12.50?")) == "what costs 12.50?"


def test_packaged_weights_are_bfloat16_but_for_decays(tmp_path, monkeypatch):
    write_folder(tmp_path / "model", tiny_model(tiny_config()))
    size = package_model.package(tmp_path / "model", tmp_path / "package")
    assert size == sum(path.stat().st_size for path in (tmp_path / "package").iterdir())
    before, after = (
        load_params(tmp_path / name, scanned=False)[1] for name in ("model", "package")
    )
    exact = {name for name in after if after[name].dtype == "float32"}
    assert exact == {f"layers.1.self_attn.{name}" for name in package_model.EXACT}
    for name, value in before.items():
        kept = value if name in exact else value.astype("bfloat16")
        assert bool((after[name] == kept).all())
    monkeypatch.setattr("infinitevl_jax.checkpoints.packaged.LARGEST", 1000)
    with pytest.raises(InfiniteVLError, match="at most 1,000"):
        package_model.package(tmp_path / "model", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_table_has_means_and_ranges():
    def line(seed, variant, accuracy):
        found = {"accuracy": accuracy, "blind_accuracy": 0.25, "tokens": 12.4}
        return {"seed": seed, "variant": variant, "tasks": {"words": found}}

    lines = [line(0, "hybrid", 0.5), line(1, "hybrid", 0.75), line(0, "teacher", 1.0)]
    assert tiny_vlm.table(lines) == [
        "| task | tokens of a prompt | blind | teacher (1 seed) | hybrid (2 seeds) |",
        "|---|---|---|---|---|",
        "| words | 12 | 25.0% | 100.0% | 62.5% (50.0% to 75.0%) |",
    ]


def test_presets_make_one_model():
    """What the stages need of one another, at full size."""
    teacher = load_preset("infinitevl_tiny_teacher")
    text, mixers = teacher.model.text, load_preset("infinitevl_tiny_layerwise").model.mixers
    assert mixers.layer_types == (SLIDING, LINEAR, LINEAR, LINEAR) and mixers.sliding_window == 64
    # keys of a head are copied, values need twice their width
    assert mixers.linear_head_dim == text.head_dim and mixers.expand_v == 2
    before = None
    for stage in ("teacher", *tiny_vlm.STAGES):
        preset = load_preset(f"infinitevl_tiny_{stage}")
        assert preset.model.from_ == (before or "")
        assert set(preset.train.data.sources) == set(teacher.train.data.sources)
        before = preset.train.output
    with pytest.raises(InfiniteVLError, match="names no stage"):
        tiny_vlm.Changes(["tutor:train.steps=1"]).load("teacher")
    changed = tiny_vlm.Changes(["long:train.seed=4"], 0.5, "fonts", "words.txt").load("long")
    assert changed.train.seed == 4 and changed.train.steps == 100
    assert changed.train.data.sources["lines"].options["fonts"] == "fonts"
    assert "fonts" not in changed.train.data.sources["easy_vqa"].options
