"""Shell commands of the documentation in this process: run, or only checked for programs and
arguments that exist. A preset that is named exists, and takes the changes."""

import argparse
import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable

import pytest
import typer
from doc_pages import ROOT
from typer.testing import CliRunner

from infinitevl_jax.cli import app
from infinitevl_jax.config.presets import load_preset

ASSIGNMENT = re.compile(r"[A-Z_]+=\S+")
TYPED = "Hello\n/quit\n"  # what someone says to a program that asks


class Parsed(Exception):
    """A program has parsed its arguments, and would begin to work now."""


def handle(words: tuple[str, ...], runs: bool) -> None:
    """Run a command, or check it. Fails for what is neither known nor taken by its program."""
    if words[0] == "export":
        assert not runs and all(map(ASSIGNMENT.fullmatch, words[1:]))
        return
    if words[0] == ".":
        assert words[1:] == (".venv/bin/activate",), f"{words}: only the environment is activated"
        return
    while ASSIGNMENT.fullmatch(words[0]):
        assert not runs, f"{words}: this process has its environment already"
        words = words[1:]
    program, arguments = words[0].removeprefix(".venv/bin/"), words[1:]
    assert program in PROGRAMS, f"{' '.join(words)}: no test knows {program}"
    PROGRAMS[program](arguments, runs)


def python(arguments: tuple[str, ...], runs: bool) -> None:
    """A script or module of this project, or a module that is run in a process of its own."""
    if arguments[0] in SCRIPTS:
        infinitevl((SCRIPTS[arguments[0]], *arguments[1:]), runs)
    elif arguments[0] != "-m":
        main = runpy.run_path(str(ROOT / arguments[0]), run_name="__not_main__")["main"]
        call(main, arguments, runs)
    elif arguments[1].split(".")[0] in ("benchmarks", "pallas_kernels", "infinitevl_jax"):
        call(importlib.import_module(arguments[1]).main, arguments[1:], runs)
    elif arguments[1] == "pytest":
        tests(arguments[2:], runs)
    else:
        assert runs and arguments[1] in ("venv", "ruff")
        lenient = (
            ["--exit-zero"] if arguments[1:3] == ("ruff", "check") else []
        )  # what it finds is no fault of the documentation
        subprocess.run([sys.executable, *arguments, *lenient], check=True, capture_output=True)


def call(main: Callable, arguments: tuple[str, ...], runs: bool) -> None:
    """A program's `main`, up to where its arguments are parsed unless it runs."""
    parse = argparse.ArgumentParser.parse_args

    def only_parse(self, *args, **kwargs):
        raise Parsed(parse(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(arguments))
        if not runs:
            patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
        try:
            code = main()
        except SystemExit as ended:
            code = ended.code
        except Parsed as parsed:
            (found,) = parsed.args
            if changes := getattr(found, "changes", []):
                load_preset(getattr(found, "config", "easy_vqa"), changes)
            return
    assert runs, f"{' '.join(arguments)} parsed no arguments: it ended with {code}"
    assert code in (None, 0), f"{' '.join(arguments)} ended with {code}"


def infinitevl(arguments: tuple[str, ...], runs: bool) -> None:
    if runs:
        result = CliRunner().invoke(app, list(arguments), input=TYPED, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip(), "it said nothing"
    else:
        parse(typer.main.get_command(app), arguments)


def parse(command, words: tuple[str, ...]) -> None:
    """Parse a command line of `infinitevl` down to its last command."""
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    found = command.make_context(command.name, list(words)).params
    if "config" in found:
        load_preset(found["config"], found["changes"])


def pip(arguments: tuple[str, ...], runs: bool) -> None:
    """Extras that are asked for are declared."""
    assert not runs and arguments[0] == "install"
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    for extras in re.findall(r"^\.\[(.+)\]$", "\n".join(arguments[1:]), flags=re.MULTILINE):
        assert set(extras.split(",")) <= set(declared)


def tests(arguments: tuple[str, ...], runs: bool) -> None:
    """Test files that are named exist."""
    assert not runs
    assert all((ROOT / name).exists() for name in arguments if not name.startswith("-"))


def srun(arguments: tuple[str, ...], runs: bool) -> None:
    """The command that SLURM starts behind its own options."""
    assert not runs
    own = next(i for i, word in enumerate(arguments) if not word.startswith("-"))
    handle(arguments[own:], runs)


def gcloud(arguments: tuple[str, ...], runs: bool) -> None:
    """The command that is run on every host of a slice."""
    assert not runs and "--worker=all" in arguments
    (command,) = (word for word in arguments if word.startswith("--command="))
    handle(tuple(shlex.split(command.removeprefix("--command="))), runs)


def run_tests(arguments: tuple[str, ...], runs: bool) -> None:
    assert os.access(ROOT / "tests" / "run", os.X_OK)
    tests(arguments, runs)


SCRIPTS = {"train.py": "train", "convert_torch.py": "convert"}
PROGRAMS = {
    "python": python,
    "python3": python,
    "infinitevl": infinitevl,
    "pip": pip,
    "pytest": tests,
    "srun": srun,
    "gcloud": gcloud,
    "tests/run": run_tests,
}
