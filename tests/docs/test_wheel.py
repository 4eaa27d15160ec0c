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


def test_it_works_outside_the_checkout(built, tmp_path):
    """Installed without its dependencies, which are those of this environment, and started from
    elsewhere."""
    there = tmp_path / "installed"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        str(there),
        str(built),
    ]
    subprocess.run(command, check=True, capture_output=True)
    code = (
        "import infinitevl_jax, pallas_kernels; from infinitevl_jax.processing import Processor;"
        "print(infinitevl_jax.__file__, pallas_kernels.__file__, bool(Processor()))"
    )
    environment = os.environ | {"PYTHONPATH": str(there)}
    for run in ([sys.executable, "-c", code], [str(there / "bin" / "infinitevl"), "--help"]):
        done = subprocess.run(
            run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert str(ROOT) not in done.stdout
    assert (
        "infinitevl" in done.stdout
        and (there / "share" / "infinitevl_jax" / "configs" / "easy_vqa.toml").is_file()
    )
