"""Presets: accepted and refused values."""

from pathlib import Path

import pytest

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.config.presets import RENAMED, Preset, differences, load_preset, to_tree
from infinitevl_jax.config.shipped import known_presets

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ["easy_vqa"]
SHIPPED += [f"smollm2_{stage}" for stage in ("distill", "layerwise", "long", "supervised")]
SHIPPED += ["tiny_distill", "tiny_layerwise", "tiny_teacher", "tiny_tune"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_presets_load_and_say_what_they_are(path):
    preset = load_preset(path)
    assert preset.train.output.startswith("runs/")
    header = path.read_text().split("[")[0]
    assert (
        f"python train.py configs/{path.name}" in header
        and "expect" in header
        and "minutes" in header
    )


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
