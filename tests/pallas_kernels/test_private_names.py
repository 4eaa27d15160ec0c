"""Modules use each other's public names only, and private names of JAX are in one module of each
package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = "pallas_kernels", "infinitevl_jax"
JAX = "jax", "jaxlib", "flax"
JAX_PRIVATE = [
    ROOT / place / "jax_private.py"
    for place in ("pallas_kernels/testing", "infinitevl_jax/processes")
]
NAMED_TUPLE = {"_asdict", "_fields", "_make", "_replace"}
PLACES = *OURS, "tests/pallas_kernels", "benchmarks"
FILES = sorted(path for place in PLACES for path in (ROOT / place).rglob("*.py"))


def private(name):
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def root(node):
    """The name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def violations(source, packages):
    """Private names of these packages that are imported, or accessed on what is imported."""
    tree, imported, found = ast.parse(source), set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [(alias.name, alias) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(f"{node.module}.{alias.name}", alias) for alias in node.names]
        else:
            continue
        for path, alias in names:
            if path.split(".")[0] in packages:
                imported.add(alias.asname or alias.name.split(".")[0])
                if any(map(private, path.split("."))):
                    found.append(f"line {node.lineno}: {path}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and root(node) in imported:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_what_is_found():
    source = """
import jax._src.core
import pallas_kernels.dispatch
from jax import lax
from pallas_kernels import dispatch, partition as mesh
from pallas_kernels.dispatch import _choose, Dispatch
dispatch._choose, mesh.OperatorMesh._split, pallas_kernels.dispatch._choose, lax._x
dispatch.choose, Dispatch._fields, self._choose, lax.__name__
"""
    assert violations(source, OURS) == [
        "line 6: pallas_kernels.dispatch._choose",
        "line 7: dispatch._choose",
        "line 7: mesh.OperatorMesh._split",
        "line 7: pallas_kernels.dispatch._choose",
    ]
    assert violations(source, JAX) == ["line 2: jax._src.core", "line 7: lax._x"]


@pytest.mark.parametrize("packages", [OURS, JAX], ids=["ours", "jax"])
def test_no_private_names(packages):
    assert len(FILES) > 200
    files = [path for path in FILES if packages == OURS or path not in JAX_PRIVATE]
    found = {
        str(path.relative_to(ROOT)): names
        for path in files
        if (names := violations(path.read_text("utf-8"), packages))
    }
    assert not found


def test_the_lists_are_used():
    for path in JAX_PRIVATE:
        assert "jax._src" in path.read_text("utf-8") and violations(path.read_text("utf-8"), JAX)
