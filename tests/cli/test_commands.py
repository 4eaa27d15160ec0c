"""Entry points of the commands, and their output before any computation."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import infinitevl_jax.__main__
from infinitevl_jax.cli import app

ROOT = Path(__file__).parents[2]


def call(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.parametrize("module", ["infinitevl_jax", "infinitevl_jax.cli"])
def test_as_a_module(module):
    done = call("-m", module, "--help")
    assert (
        done.returncode == 0 and "Usage: infinitevl" in done.stdout and "--version" in done.stdout
    ), done.stderr


def test_train_alone_prints_help_and_presets():
    done = call("train.py")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        "Usage: train.py" in done.stderr
        and "--no-compilation-cache" in done.stderr
        and "required" not in done.stderr
    )
    known = ", ".join(f"configs/{path.name}" for path in sorted((ROOT / "configs").glob("*.toml")))
    assert done.stderr.splitlines()[-1] == f"error: name a preset. Those that come along: {known}"


def test_mistakes_of_train_and_convert_are_one_message():
    for arguments, status, culprit in (
        (("train.py", "no.toml"), 2, "no.toml"),
        (("-m", "infinitevl_jax", "train", "no.toml"), 2, "no.toml"),
        (("convert_torch.py", "inspect", "/no/where"), 1, "/no/where"),
        (("-m", "infinitevl_jax", "convert", "inspect", "/no/where"), 1, "/no/where"),
    ):
        done = call(*arguments)
        assert done.returncode == status and done.stdout == ""
        assert done.stderr.startswith("error: ") and culprit in done.stderr
        assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert_torch.py", "--help"),
        ("-m", "infinitevl_jax", "convert", "--help"),
        ("-m", "infinitevl_jax", "info", "--help"),
    ],
    ids=lambda a: a[-2],
)
def test_paths_in_help_are_those_that_runs_have(arguments):
    help_text = call(*arguments).stdout
    assert "runs/sft/checkpoints/1000/" in help_text and not re.search(r"step_\d", help_text)


def test_our_warnings_are_one_line():
    code = """
import warnings
from infinitevl_jax import InfiniteVLWarning
from infinitevl_jax.command import run
run(lambda: warnings.warn("x is y", InfiniteVLWarning))
"""
    done = call("-c", code)
    assert (done.returncode, done.stderr) == (0, "warning: x is y\n")


def test_a_status_is_passed_on():
    for main, status in (("lambda: 3", 3), ("lambda: None", 0), ("lambda: sys.exit(5)", 5)):
        assert (
            call(
                "-c", f"import sys; from infinitevl_jax.command import run; run({main})"
            ).returncode
            == status
        )


def test_a_bug_keeps_its_traceback():
    done = call("-c", "from infinitevl_jax.command import run; run(lambda: 1 / 0)")
    assert (
        done.returncode == 1 and "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr
    )


def test_scripts_are_thin(monkeypatch):
    """Each is one command of `infinitevl`, by the script's own name."""
    for script, command in (("train.py", "train"), ("convert_torch.py", "convert")):
        seen = []
        monkeypatch.setattr(
            infinitevl_jax.__main__, "main", lambda *given, seen=seen: seen.append(given)
        )
        runpy.run_path(str(ROOT / script), run_name="__main__")
        assert seen == [(command, script)] and command in get_command(app).commands
