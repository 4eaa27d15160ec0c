"""A folder with what the documentation's commands and snippets name: a tiny model, a picture, a
film, an adapter, a preset."""

import json
import os
import shutil
import sys

import av
import jax.numpy as jnp
import numpy as np
import pytest
from doc_pages import ROOT, blocks
from PIL import Image
from tiny_folder import tiny_config, tiny_model, write_folder
from torch_folders import read_folder, safetensors_bytes

from benchmarks import kernels
from infinitevl_jax.checkpoints import export_folder, load_params, read_config
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.nn.lora import is_adapter
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.train.checkpoints import Checkpoints
from infinitevl_jax.train.lora import with_lora
from infinitevl_jax.train.step import TrainState
from pallas_kernels.operators import OPERATORS

ADAPTED = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="session")
def stocked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    rng = np.random.default_rng(0)
    ours = write_folder(
        folder / "runs" / "mixers" / "checkpoints" / "1000", tiny_model(tiny_config())
    )
    export_folder(ours, folder / "InfiniteVL")
    Image.fromarray(rng.integers(0, 255, (12, 20, 3), np.uint8)).save(folder / "photo.jpg")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(6):
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        rng.integers(0, 255, (16, 16, 3), np.uint8), format="rgb24"
                    )
                )
            )
        container.mux(stream.encode())
    write_adapter(folder / "my-lora", read_folder(folder / "InfiniteVL")[ADAPTED + ".weight"][1])
    stock_data(folder)
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copytree(ROOT / "docs", folder / "docs")
    presets = [b.text for b in blocks(ROOT / "docs" / "training.md") if b.language == "toml"]
    (folder / "mixers.toml").write_text(presets[0], "utf-8")
    (lora,) = [preset for preset in presets if "[train.lora]" in preset]
    (folder / "lora.toml").write_text(lora, "utf-8")
    write_lora_step(folder / "runs" / "lora", ours)
    return folder


def stock_data(folder):
    """Data of one's own: conversations about photos, and a folder of books."""
    (folder / "photos").mkdir()
    shutil.copy(folder / "photo.jpg", folder / "photos")
    said = [{"from": "human", "value": "<image>Who?"}, {"from": "gpt", "value": "A cat."}]
    rows = [{"image": "photo.jpg", "conversations": said}] * 60
    (folder / "my.json").write_text(json.dumps(rows))
    (folder / "books").mkdir()
    (folder / "books" / "tale.txt").write_text("Once upon a time.\n" * 20)


def write_lora_step(run, base):
    """Step 500 of a LoRA run."""
    lora, config = LoraConfig(rank=2), read_config(base)
    params = load_params(base, scanned=False)[1]
    known = parameters(config, scanned=False, lora=lora)
    adapters = {
        name: jnp.full(p.shape, 0.01, jnp.float32) for name, p in known.items() if is_adapter(name)
    }
    manifest = with_lora(Manifest.read(base), lora, known, list(adapters))
    state = TrainState(adapters, params, {}, jnp.asarray(500))
    Checkpoints(run, base, manifest, 1).save(state, {})


def write_adapter(folder, shape):
    """A LoRA adapter of rank 2 for one projection."""
    folder.mkdir()
    sides = {"A": np.ones((2, shape[1]), np.float32), "B": np.ones((shape[0], 2), np.float32)}
    tensors = {
        f"base_model.model.{ADAPTED}.lora_{side}.weight": value for side, value in sides.items()
    }
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2})
    )


@pytest.fixture
def workspace(stocked, tmp_path, monkeypatch):
    """A copy of the folder, in which the test works; what programs do to the process is undone."""
    folder = tmp_path / "work"
    shutil.copytree(stocked, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(kernels, "DOCUMENT", folder / "docs" / "kernels.md")
    for operator in OPERATORS:  # what a snippet registers is gone afterwards
        monkeypatch.setattr(operator, "implementations", operator.implementations)
    before = dict(os.environ)
    yield folder
    os.environ.clear()
    os.environ.update(before)
