"""A run killed at any step resumes with bit-equal losses; Ctrl-C saves; a step is a checkpoint."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK
from tiny_run import write_preset

from infinitevl_jax import InfiniteVL, Processor
from infinitevl_jax.checkpoints import export_folder, import_folder, load_params
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.train.log import read_log
from infinitevl_jax.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
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


def wait_for_step(process, run, step):
    while process.poll() is None and not any(
        line["step"] >= step for line in read_log(run / "log.jsonl")
    ):
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_data, start):
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(write_preset(folder, tiny_data))
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return folder / "run"


def test_killed_run_goes_on_to_the_same_losses(tmp_path, tiny_data, whole, start):
    preset, run = write_preset(tmp_path, tiny_data), tmp_path / "run"
    step = random.SystemRandom().randint(1, 5)
    process = start(preset)
    wait_for_step(process, run, step)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(losses(run)) < len(losses(whole)), f"finished before it was killed at step {step}"
    saved = any(
        path.name.isdigit() for path in (run / "checkpoints").glob("*")
    )  # killed before its first checkpoint it begins anew
    process = start(preset)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and ("going on from step" in out) == saved, out
    assert losses(run) == losses(whole), f"killed at step {step}"
    params = [load_params(r / "checkpoints" / "6", scanned=True)[1] for r in (run, whole)]
    assert all(
        np.asarray(params[0][k]).tobytes() == np.asarray(params[1][k]).tobytes() for k in params[1]
    )


def test_what_a_run_leaves(whole):
    lines = losses(whole)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert "held_out_loss" in lines[-1] and 0 <= lines[-1]["held_out_exact"] <= 1
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == ["4", "6"]  # the newest two
    assert json.loads((whole / "preset.json").read_text())["train"]["steps"] == 6


def test_a_step_can_be_opened_exported_and_imported(whole, tmp_path):
    step = whole / "checkpoints" / "6"
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
    preset = load_preset(write_preset(tmp_path, tiny_data), [f"train.output={whole}"])
    before = losses(whole)
    outcome = train(preset)
    assert outcome.finished and outcome.step == 6 and losses(whole) == before


def test_stopping_saves_and_going_on_changes_nothing(tmp_path, tiny_data, whole, start):
    """Ctrl-C finishes the current step, saves it and says how to resume."""
    preset, run = write_preset(tmp_path, tiny_data), tmp_path / "run"
    process = start(preset)
    wait_for_step(process, run, 1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.fail("the run was over before it could be stopped")
    assert process.returncode == 130 and "goes on from here" in out, out
    done = losses(run)[-1]["step"]
    assert (run / "checkpoints" / str(done)).is_dir()
    process = start(preset)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and f"going on from step {done}" in out, out
    assert losses(run) == losses(whole)


def test_training_from_a_checkpoint_with_frozen_parts(tmp_path, tiny_data, whole):
    """model.from takes a step's folder. Frozen parameters keep their bits in the checkpoint."""
    path = tmp_path / "tune.toml"
    text = (tmp_path / write_preset(tmp_path, tiny_data).name).read_text()
    head, tail = text.split("[run]")
    path.write_text(f'[model]\nfrom = "{whole / "checkpoints" / "6"}"\n\n[run]{tail}')
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
    old = load_params(whole / "checkpoints" / "6", scanned=True)[1]
    new = load_params(outcome.checkpoint, scanned=True)[1]
    assert old.keys() == new.keys()
    changed = {name for name in old if not jnp.array_equal(old[name], new[name])}
    assert changed and all(name.startswith("layers.") and ".self_attn." in name for name in changed)
