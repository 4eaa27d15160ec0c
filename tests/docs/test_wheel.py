"""The wheel is what an outsider installs: it holds everything that the package reads at run time,
and nothing else."""

import configparser
import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from torch_folders import hybrid_folder

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("infinitevl_jax", "pallas_kernels", "configs", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Built offline from a copy of the sources alone, so that the checkout stays as it was."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    model = folder / "infinitevl_jax" / "models" / "example"
    model.mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "chat_template.jinja", "log.jsonl"):
        (model / name).touch()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        "dist",
        ".",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture
def wheel(built):
    with zipfile.ZipFile(built) as archive:
        yield archive


def read(wheel, ending: str) -> str:
    (name,) = [name for name in wheel.namelist() if name.endswith(ending)]
    return wheel.read(name).decode()


def test_every_file_of_the_packages_is_in_it(wheel):
    held = set(wheel.namelist())
    for package in ("infinitevl_jax", "pallas_kernels"):
        files = [
            path
            for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        ]
        missing = {str(path.relative_to(ROOT)) for path in files} - held
        assert not missing
        assert f"{package}/py.typed" in held
    assert "infinitevl_jax/processing/qwen_vl.jinja" in held
    assert {path.rpartition("/")[2] for path in held if "/models/example/" in path} == {
        *("model.safetensors", "config.json", "chat_template.jinja", "log.jsonl")
    }


def test_presets_are_in_it(wheel):
    for preset in (ROOT / "configs").glob("*.toml"):
        assert read(
            wheel, f".data/data/share/infinitevl_jax/configs/{preset.name}"
        ) == preset.read_text("utf-8")


def test_the_command_is_in_it(wheel):
    scripts = configparser.ConfigParser()
    scripts.read_string(read(wheel, "/entry_points.txt"))
    assert dict(scripts["console_scripts"]) == {"infinitevl": "infinitevl_jax.__main__:main"}


def test_nothing_else_is_in_it(wheel):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {re.sub(r"-[\d.]+\.(dist-info|data)$", r".\1", top) for top in tops} == {
        "infinitevl_jax",
        "pallas_kernels",
        "infinitevl_jax.dist-info",
        "infinitevl_jax.data",
    }


def test_metadata_names_licence_and_extras(wheel):
    metadata = email.message_from_string(read(wheel, "/METADATA"))
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == [
        "LICENSE"
    ]
    assert read(wheel, "/licenses/LICENSE") == (ROOT / "LICENSE").read_text("utf-8")
    assert metadata.get_all("Provides-Extra") == list(declared["optional-dependencies"])
    assert len(metadata.get_all("Project-URL")) == len(declared["urls"])


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """call(command, folder) runs a program in a folder outside the checkout, with the wheel
    installed; its dependencies are those of this environment."""
    there = tmp_path_factory.mktemp("installed")
    options = ["-q", "--no-deps", "--no-index", "--no-compile", "--target", str(there)]
    command = [sys.executable, "-m", "pip", "install", *options, str(built)]
    subprocess.run(command, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(there), "JAX_PLATFORMS": "cpu"}

    def call(command, folder):
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert str(ROOT) not in done.stdout + done.stderr
        return done

    call.infinitevl = str(there / "bin" / "infinitevl")
    return call


def test_packages_are_imported_outside_the_checkout(installed, tmp_path):
    code = (
        "import infinitevl_jax, pallas_kernels; from infinitevl_jax.processing import Processor;"
        "print(infinitevl_jax.__file__, pallas_kernels.__file__, bool(Processor()))"
    )
    done = installed([sys.executable, "-c", code], tmp_path)
    assert done.returncode == 0 and "True" in done.stdout, done.stderr


@pytest.mark.parametrize("command", ["", "ask", "chat", "info", "train", "data", "eval", "convert"])
def test_commands_run_outside_the_checkout(installed, tmp_path, command):
    done = installed([installed.infinitevl, *command.split(), "--help"], tmp_path)
    assert done.returncode == 0 and f"Usage: infinitevl {command}".strip() in done.stdout


def test_presets_are_found_by_name_outside_the_checkout(installed, tmp_path):
    """`infinitevl train NAME` reads the preset: a change that does not fit it is refused."""
    done = installed([installed.infinitevl, "train"], tmp_path)
    assert done.returncode == 2
    names = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.toml")))
    assert done.stderr.endswith(f"error: name a preset. Those that come along: {names}\n")
    done = installed([installed.infinitevl, "train", "easy_vqa", "train.steps=none"], tmp_path)
    assert done.returncode == 2 and "train.steps" in done.stderr, done.stderr
    code = (
        "from infinitevl_jax.config.presets import load_preset;"
        "print(load_preset('easy_vqa').train.output)"
    )
    done = installed([sys.executable, "-c", code], tmp_path)
    assert done.stdout == "runs/easy_vqa\n", done.stderr


def test_convert_runs_outside_the_checkout(installed, tmp_path):
    hybrid_folder(tmp_path / "hf")
    for words in (["import", "hf", "ours"], ["export", "ours", "again"], ["inspect", "again"]):
        done = installed([installed.infinitevl, "convert", *words], tmp_path)
        assert done.returncode == 0 and "infinite_vl" in done.stdout, done.stderr
