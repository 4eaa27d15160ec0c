"""Imports go one way, and what prepares inputs on the host computes nothing with jax."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Modules beside the folders that any folder may import.
BASE = {
    "command",
    "compilation",
    "dtypes",
    "errors",
    "extras",
    "interrupts",
    "locking",
    "rational",
    "reading",
    "special_tokens",
    "writing",
}

# What each folder of infinitevl_jax imports, `BASE` and itself left out. A folder stands below all
# that it imports, so there is no way round.
ALLOWED = {
    "pallas_kernels": "",
    "config": "",
    "processes": "",
    "processing": "",
    "inputs": "config",
    "sharding": "config pallas_kernels",
    "nn": "config inputs sharding pallas_kernels",
    "families": "config",
    "checkpoints": "config families nn",
    "data": "config inputs processing",
    "train": "config inputs sharding nn families checkpoints processing processes data"
    " pallas_kernels",
    "serve": "config inputs sharding nn checkpoints processing",
    "eval": "config inputs processing data serve",
    "cli": "config sharding nn checkpoints processing processes serve data train eval",
    "__init__": "processing serve",  # the package's public names, imported when they are asked for
}
ENTRY_POINT = {"__main__": "cli"}  # the command's address in the wheel, a part of `cli`


def folder_of(file: Path) -> str:
    """The folder of a source file as `ALLOWED` names it; a module's own name beside the folders."""
    package, *inside = file.relative_to(ROOT).with_suffix("").parts
    return package if package == "pallas_kernels" else ENTRY_POINT.get(inside[0], inside[0])


def imported_modules(file: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, in functions too, and of the names that it
    imports from them."""
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_folders(file: Path) -> set[str]:
    """Folders of this project that a file imports, `BASE` and its own left out."""
    found = set()
    for name in imported_modules(file):
        package, *inside = name.split(".")
        if package == "pallas_kernels":
            found.add(package)
        elif package == "infinitevl_jax" and inside and inside[0] != "__version__":
            found.add(ENTRY_POINT.get(inside[0], inside[0]))
    return found - BASE - {folder_of(file)}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_the_table_has_no_way_round():
    above: list[str] = []
    for folder, imports in ALLOWED.items():
        assert set(imports.split()) <= set(above), folder
        above.append(folder)


def test_every_folder_is_in_the_table():
    folders = {folder_of(file) for file in sources("infinitevl_jax")}
    assert folders - BASE == set(ALLOWED) - {"pallas_kernels"}


def test_imports_go_one_way():
    wrong = [
        f"{file.relative_to(ROOT)} imports {other}"
        for file in [*sources("infinitevl_jax"), *sources("pallas_kernels")]
        for other in sorted(imported_folders(file) - set(ALLOWED.get(folder_of(file), "").split()))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from infinitevl_jax.serve import sampling", {"serve"}),
        ("def f():\n    import infinitevl_jax.train.step as s", {"train"}),
        ("from infinitevl_jax import InfiniteVL, data", {"InfiniteVL", "data"}),
        ("from pallas_kernels import attention", {"pallas_kernels"}),
        ("from ..serve import sampling", {"serve"}),
        ("from .. import train", {"train"}),
        ("from . import patches\nfrom infinitevl_jax.errors import InfiniteVLError", set()),
        ("import jax", set()),
    ],
)
def test_every_kind_of_import_is_seen(tmp_path, monkeypatch, text, found):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "infinitevl_jax" / "inputs" / "module.py"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    assert imported_folders(file) == found


def test_inputs_take_types_alone_from_jax():
    allowed = {"jax", "jax.Array", "jax.ShapeDtypeStruct", "jax.tree_util.register_dataclass"}
    for file in sources("infinitevl_jax/inputs"):
        used = {name for name in imported_modules(file) if name.split(".")[0] in ("jax", "flax")}
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and (name := ast.unparse(node)).startswith("jax."):
                used.add(name)
        assert used - {"jax.tree_util"} <= allowed, file.name


# jax finds no device here, so anything that it computes is an error
NO_DEVICE = """\
import pkgutil, importlib
import numpy as np
import infinitevl_jax.inputs
for module in pkgutil.walk_packages(infinitevl_jax.inputs.__path__, "infinitevl_jax.inputs."):
    importlib.import_module(module.name)

from infinitevl_jax.inputs.model_inputs import build_inputs, chunks, packed_shapes, text_inputs
from infinitevl_jax.inputs.packing import Packing
from tiny import conversation, hybrid_config

config = hybrid_config()
batch = conversation(config)
packing = Packing(2, 96, patches=160)
assert packing.add(batch["input_ids"].shape[1], 132)
built = build_inputs(config, **batch, packing=packing)
assert built.patches.pixels.shape == packed_shapes(config, packing)[1].pixels.shape
assert len(list(chunks(build_inputs(config, **batch).decoder, 32))) == 3
text_inputs(np.ones((1, 3), np.int32))

import jax.numpy as jnp
try:
    jnp.zeros(1)
except RuntimeError as error:
    assert "no_such_platform" in str(error)
    print("nothing was computed")
"""


def test_inputs_are_built_without_a_device():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform", "PYTHONPATH": path}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", NO_DEVICE],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.stdout.strip() == "nothing was computed", done.stderr
