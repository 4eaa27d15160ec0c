"""Ours -> Hugging Face folder."""

import contextlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from infinitevl_jax.checkpoints.destination import new_folder
from infinitevl_jax.checkpoints.dtypes import narrowed
from infinitevl_jax.checkpoints.files import copy_side_files, is_ours
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.reading import read_config
from infinitevl_jax.checkpoints.safetensors_file import SafetensorsWriter
from infinitevl_jax.checkpoints.source import check_finite, index_json, respell
from infinitevl_jax.checkpoints.stored import open_params
from infinitevl_jax.checkpoints.transformers_code import add_transformers_code
from infinitevl_jax.checkpoints.weights import (
    complain,
    embedding_name,
    head_name,
    hub_name,
    leaves,
    own_spelling,
)
from infinitevl_jax.errors import InfiniteVLError

DEFAULT_SHARD = 5 * 10**9
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


@dataclass(frozen=True)
class _Tensor:
    """A torch tensor to write: its name on disk, and what it is."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_folder(
    src: str | Path,
    dst: str | Path,
    *,
    max_shard_size: int | str | None = None,
    merge: bool = True,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Convert one of our folders (imported, born here, or a step of a training run) to a Hugging
    Face folder.

    A model that was imported gets the source's names, dtypes, order and shards back. Memory holds
    one tensor at a time (of a folder of format 2, one stack of layers).

    Args:
      max_shard_size: bytes, or "2GB"; None keeps the source's shards (5 GB for a model born here).
      merge: add the adapters of a LoRA run to the weights; else they are left out, and the result
        is the base of the adapter (`infinitevl_jax.checkpoints.export_adapter`).
      overwrite: replace a checkpoint folder at `dst`, once the new one is complete.
      progress: show a bar.

    Raises:
      InfiniteVLError: names what is missing or damaged, and the cure.
    """
    src = Path(src)
    if not src.is_dir() or not is_ours(src):
        raise InfiniteVLError(
            f"{src} is not one of our folders: it has no infinitevl_jax.json",
            "export takes what import or train.py wrote",
        )
    limit = _bytes(max_shard_size)
    config, manifest = read_config(src), Manifest.read(src)
    reader = open_params(src, config, merge=merge)
    stored = {leaf.name: leaf for leaf in leaves(config, scanned=False)}
    spelling = manifest.spelling if manifest.files else own_spelling(config)
    tensors = {
        leaf.torch[0]: _Tensor(
            respell(leaf.torch[0], spelling), reader.dtypes[leaf.name], leaf.torch_shape
        )
        for leaf in stored.values()
    }
    head, table = head_name(config), tensors[embedding_name(config)]
    tied = config.text.tie_word_embeddings and head in manifest.dtypes
    if tied:
        tensors[head] = _Tensor(head, table.dtype, table.shape)
    plan = _plan(tensors, manifest, limit, src)
    total = sum(tensor.nbytes for tensor in tensors.values())
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="export", disable=None if progress else True
    )  # on a terminal
    with (
        bar,
        new_folder(dst, overwrite=overwrite, inputs=(src,), needs=total) as work,
        contextlib.ExitStack() as stack,
    ):
        copy_side_files(src, work)
        add_transformers_code(work, config)
        writers: dict[str, tuple[SafetensorsWriter, str]] = {}
        for file, (metadata, names) in plan.items():
            entries = [(raw, tensors[name].dtype, tensors[name].shape) for raw, name in names]
            writer = SafetensorsWriter(work / file, entries, metadata)
            stack.callback(writer.abort)
            writers |= {name: (writer, raw) for raw, name in names}

        def put(name: str, value: np.ndarray) -> None:
            writer, raw = writers[name]
            writer.put(raw, value)
            bar.update(value.nbytes)

        for name in reader.shapes:
            value, leaf = reader.read(name), stored[name]
            check_finite(value, f"{reader.path}: {name}")
            torch = leaf.torch[0]
            value = narrowed(leaf.to_torch(value), tensors[torch].dtype, torch, src)
            put(torch, value)
            if tied and torch == embedding_name(config):
                put(head, value)
        for writer in {id(writer): writer for writer, _ in writers.values()}.values():
            writer.close()
        if list(plan) != ["model.safetensors"] or manifest.index_metadata is not None:
            weight_map = {raw: file for file, (_, names) in plan.items() for raw, _ in names}
            text = index_json(weight_map, {**(manifest.index_metadata or {}), "total_size": total})
            (work / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _plan(
    tensors: dict[str, _Tensor], manifest: Manifest, limit: int | None, src: Path
) -> dict[str, tuple[dict, list[tuple[str, str]]]]:
    """File name -> (metadata, [(name on disk, published name)] in order)."""
    if manifest.files:
        complain(
            {name: () for name in tensors},
            {name: () for name in manifest.dtypes},
            f"{src}/infinitevl_jax.json",
            "config.json",
        )
    if manifest.files and limit is None:
        return {
            f.name: (f.metadata, [(raw, hub_name(raw)) for raw, _ in f.tensors])
            for f in manifest.files
        }
    listed = [(raw, hub_name(raw)) for file in manifest.files for raw, _ in file.tensors]
    order = listed or [(tensors[name].name, name) for name in sorted(tensors, key=_natural)]
    metadata = manifest.files[0].metadata if manifest.files else {"format": "pt"}
    shards, room = [[]], limit or DEFAULT_SHARD
    for raw, name in order:
        if (
            shards[-1]
            and sum(tensors[n].nbytes for _, n in shards[-1]) + tensors[name].nbytes > room
        ):
            shards.append([])
        shards[-1].append((raw, name))
    if len(shards) == 1:
        return {"model.safetensors": (metadata, shards[0])}
    return {
        f"model-{i:05}-of-{len(shards):05}.safetensors": (metadata, shard)
        for i, shard in enumerate(shards, 1)
    }


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _bytes(size: int | str | None) -> int | None:
    if size is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if not found or found[2] not in _UNITS or not 1 <= float(found[1]) * _UNITS[found[2]] < 2**63:
        raise InfiniteVLError(
            f"max_shard_size is {size!r}", "write a number of bytes, or for example 5GB or 500MB"
        )
    return int(float(found[1]) * _UNITS[found[2]])
