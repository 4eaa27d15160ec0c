"""What every bad-input test of conversion asks: our error, one screen with the culprits in it, and
nothing left behind."""

import json
from pathlib import Path

import pytest
from torch_folders import HYBRID

from infinitevl_jax.errors import InfiniteVLError


def tree(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"" for p in root.rglob("*")
    }


def fails(root: Path, action, *culprits: str):
    """`action` raises our error, one screen with the culprits in it, and leaves no trace under
    `root`."""
    before = tree(root)
    with pytest.raises(InfiniteVLError) as caught:
        action()
    message = str(caught.value)
    assert all(culprit in message for culprit in culprits), message
    assert message.count("\n") < 15 and len(message) < 1600 and "->" in message, message
    assert tree(root) == before


def config(*culprits, vision=None, drop=(), **keys):
    def case(src):
        content = HYBRID | keys
        if vision is not None:
            content["vision_config"] = HYBRID["vision_config"] | vision
        (src / "config.json").write_text(
            json.dumps({k: v for k, v in content.items() if k not in drop})
        )
        return "config.json", *culprits

    return case


def text(name, content, *culprits):
    def case(src):
        (src / name).write_text(content)
        return name, *culprits

    return case
