"""A run killed five times ends as one that was not, bit for bit; Ctrl-C saves; a step is a
checkpoint."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK
from tiny_run import PRESET, write_preset

from benchmarks.kills import CHECKPOINT, START, STEP, Kill, differences, results, survive
from infinitevl_jax import InfiniteVL, Processor
from infinitevl_jax.checkpoints import export_folder, import_folder, load_params
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.train.log import read_log
from infinitevl_jax.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
STEPS = 16
ROWS = """\
batch = 2
length = 64
patches = 64
"""  # packed: of the forms of a row the one whose step compiles fastest
SAME = ("step", "loss", "accuracy", "grad_norm", "lr", "held_out_loss", "held_out_exact")


def losses(run):
    return [{k: line[k] for k in SAME if k in line} for line in read_log(run / "log.jsonl")]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start train.py in its own process on one CPU device, with a shared compilation cache."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return lambda preset: launch(preset, cache)


def launch(preset, more):
    environment = (
        os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "PYTHONUNBUFFERED": "1"} | more
    )
    command = [sys.executable, str(ROOT / "train.py"), str(preset)]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def preset_of(folder, data):
    """Long enough to be killed five times."""
    text = PRESET.replace("steps = 6\n", f"steps = {STEPS}\n")
    return write_preset(folder, data, re.sub(r"batch = (.|\n)*?length = 10\n", ROWS, text))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_data, start):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(preset_of(folder, tiny_data))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return folder / "run"


def test_a_run_killed_five_times_ends_as_one_that_was_not(tmp_path, tiny_data, whole, start):
    """Ctrl-C and SIGTERM finish the step, save it and say how to resume."""
    preset, run = preset_of(tmp_path, tiny_data), tmp_path / "run"
    kills = [
        Kill(signal.SIGKILL, CHECKPOINT, random.uniform(0, 0.03)),
        Kill(signal.SIGINT, STEP, 1),
        Kill(signal.SIGTERM, CHECKPOINT, random.uniform(0, 0.03)),
        Kill(signal.SIGKILL, START, random.uniform(0, 4)),
        Kill(signal.SIGKILL, STEP, 1),
    ]
    deaths = survive(lambda: start(preset), run, iter(kills))
    assert [death.kill for death in deaths] == kills
    assert [deaths[i].status for i in (1, 2)] == [130, 130], deaths
    assert all("goes on from here" in deaths[i].said for i in (1, 2)), deaths
    assert "going on from step" in deaths[2].said
    assert differences(results(run), results(whole)) == []


def test_what_a_run_leaves(whole):
    lines = losses(whole)
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, STEPS + 1)]
    assert "held_out_loss" in lines[-1] and 0 <= lines[-1]["held_out_exact"] <= 1
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [
        str(STEPS - 2),
        str(STEPS),
    ]  # the newest two
    assert json.loads((whole / "preset.json").read_text())["train"]["steps"] == STEPS


def test_a_step_can_be_opened_exported_and_imported(whole, tmp_path):
    step = whole / "checkpoints" / str(STEPS)
    export_folder(step, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "back")
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "configuration_infinitevl.py",
        "modeling_infinitevl.py",
    }
    old, new = (load_params(folder, scanned=True)[1] for folder in (step, tmp_path / "back"))
    assert old.keys() == new.keys()
    assert all(np.asarray(old[k]).tobytes() == np.asarray(new[k]).tobytes() for k in old)
    processor = Processor.from_pretrained(tmp_path / "back")
    image = np.full((16, 16, 3), 90, np.uint8)
    batch = processor(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image},
                    {"type": "text", "text": "what color is it?"},
                ],
            }
        ]
    )
    logits = [
        InfiniteVL.from_pretrained(folder)(**batch).logits for folder in (step, tmp_path / "back")
    ]
    assert jnp.array_equal(*logits)


def test_a_finished_run_has_nothing_left_to_do(tmp_path, tiny_data, whole, capsys):
    preset = load_preset(preset_of(tmp_path, tiny_data), [f"train.output={whole}"])
    before = losses(whole)
    outcome = train(preset)
    assert outcome.finished and outcome.step == STEPS and losses(whole) == before


def test_training_from_a_checkpoint_with_frozen_parts(tmp_path, tiny_data, whole):
    """model.from takes a step's folder. Frozen parameters keep their bits in the checkpoint."""
    path = tmp_path / "tune.toml"
    text = (tmp_path / write_preset(tmp_path, tiny_data).name).read_text()
    head, tail = text.split("[run]")
    path.write_text(f'[model]\nfrom = "{whole / "checkpoints" / str(STEPS)}"\n\n[run]{tail}')
    outcome = train(
        load_preset(
            path,
            [
                "train.steps=1",
                "train.trainable=['layers\\..*self_attn.*']",
                "train.data.held_out=''",
            ],
        )
    )
    old = load_params(whole / "checkpoints" / str(STEPS), scanned=True)[1]
    new = load_params(outcome.checkpoint, scanned=True)[1]
    assert old.keys() == new.keys()
    changed = {name for name in old if not jnp.array_equal(old[name], new[name])}
    assert changed and all(name.startswith("layers.") and ".self_attn." in name for name in changed)
