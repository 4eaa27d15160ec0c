"""Checkpoint folders that the kinds mutate, and what is in them bit for bit."""

import shutil
from pathlib import Path

import numpy as np
import safetensors
from torch_folders import HYBRID, hybrid_tensors, write_folder

from infinitevl_jax.checkpoints import import_folder, load_params
from infinitevl_jax.checkpoints.weights import hub_name, leaves

VISION = HYBRID["vision_config"] | {"depth": 1, "fullatt_block_indexes": [0]}
CONFIG = HYBRID | {"num_hidden_layers": 2, "vision_config": VISION}


def tensors(**kind) -> dict[str, np.ndarray]:
    """Torch tensors of CONFIG: the first layers of the tests' hybrid."""
    gone = [f"layers.{i}." for i in range(2, 9)] + [f"blocks.{i}." for i in (1, 2)]
    return {
        name: value
        for name, value in hybrid_tensors(**kind).items()
        if not any(g in name for g in gone)
    }


def hugging_face(folder: Path, *, shards: int = 1, **kind) -> Path:
    """A Hugging Face folder of CONFIG."""
    return write_folder(folder, tensors(**kind), config=CONFIG, shards=shards)


def one_file(folder: Path) -> Path:
    return hugging_face(folder, mixed=True)


def three_files(folder: Path) -> Path:
    return hugging_face(folder, shards=3, mixed=True)


def ours(folder: Path) -> Path:
    """One of our folders, imported from three bf16 files."""
    source = folder.with_name(folder.name + "-source")
    import_folder(hugging_face(source, shards=3), folder)
    shutil.rmtree(source)
    return folder


def as_torch(params: dict[str, np.ndarray], config) -> dict[str, np.ndarray]:
    """Parameters (unrolled) as torch tensors, by published names."""
    return {
        leaf.torch[0]: leaf.to_torch(params[leaf.name]) for leaf in leaves(config, scanned=False)
    }


def read_independently(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder as the library safetensors reads them, by published names."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                found[hub_name(name)] = file.get_tensor(name)
    return found


def parameters(folder: Path, **how):
    """Configuration and parameters in memory, as numpy."""
    config, params = load_params(folder, scanned=False, **how)
    return config, {name: np.asarray(value) for name, value in params.items()}


def different(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> str:
    """ "" where both hold the same bits, else what differs."""
    if found.keys() != wanted.keys():
        return f"other names: {sorted(found.keys() ^ wanted.keys())[:3]}"
    for name, value in wanted.items():
        if found[name].dtype != value.dtype:
            return f"another dtype: {name} {found[name].dtype} for {value.dtype}"
        if (
            found[name].shape != value.shape
            or found[name].tobytes() != np.ascontiguousarray(value).tobytes()
        ):
            return f"other numbers: {name}"
    return ""
