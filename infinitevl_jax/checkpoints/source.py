"""Where torch tensors come from: safetensors (single or sharded), torch .bin files, with LoRA
adapters merged in on the way.

Names are given in the hub's spelling. Tensors are read slice by slice as [out, in] matrices (or
vectors), checked for NaN and infinity as they pass, and counted, so that a test can see that a
device reads only its own shard.
"""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import msgspec
import numpy as np

from infinitevl_jax.checkpoints.dtypes import FLOATS
from infinitevl_jax.checkpoints.safetensors_file import SPELLED, SafetensorsFile
from infinitevl_jax.checkpoints.weights import HUB, RUNTIME, hub_name, runtime_name
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import inside, open_file, plain_name, read_json

_AGAIN = "download or copy the file again"


class _File(Protocol):
    """A file of tensors: SafetensorsFile, or a torch file made to look like one."""

    path: Path
    entries: dict
    metadata: dict[str, str]

    def array(self, name: str) -> np.ndarray: ...


class Source:
    """The torch tensors of a folder.

    Attributes:
      files: the weight files, in order.
      names: hub name -> (file, name in that file), in the order of the files.
      index_metadata: the index's own dictionary, None where there is no index.
      bytes_read: bytes taken out of the tensors so far.
    """

    def __init__(self, folder: Path, files: Sequence[_File], index_metadata: dict | None):
        self.folder, self.files, self.index_metadata = folder, files, index_metadata
        self.bytes_read = 0
        self.names: dict[str, tuple[_File, str]] = {}
        for file in files:
            for name, entry in file.entries.items():
                if entry.dtype not in FLOATS:
                    raise InfiniteVLError(
                        f"{file.path}: tensor {name} is {SPELLED.get(entry.dtype, entry.dtype)}",
                        "weights have to be bf16, f16 or f32: dequantise or cast them before"
                        " importing",
                    )
                if hub_name(name) in self.names:
                    other = self.names[hub_name(name)]
                    raise InfiniteVLError(
                        f"tensor {name} of {file.path.name} is there twice: {other[1]} in"
                        f" {other[0].path.name}",
                        f"keep one of them in {folder}",
                    )
                self.names[hub_name(name)] = (file, name)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: file.entries[raw].shape for name, (file, raw) in self.names.items()}

    def dtype(self, name: str) -> np.dtype:
        file, raw = self.names[name]
        return file.entries[raw].dtype

    @property
    def spelling(self) -> str:
        """How the names are spelled on disk."""
        return RUNTIME if any(raw != name for name, (_, raw) in self.names.items()) else HUB

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Part of a tensor, seen as a matrix [out, in] or a vector, as a fresh array.

        Raises:
          InfiniteVLError: it holds NaN or infinity.
        """
        file, raw = self.names[name]
        whole = file.array(raw)
        flat = whole if whole.ndim == 1 else whole.reshape(whole.shape[0], -1)
        part = np.array(flat[index], order="C")
        self.bytes_read += part.nbytes
        check_finite(part, f"{file.path}: tensor {raw}")
        return part


def check_finite(value: np.ndarray, what: str) -> None:
    """Raise InfiniteVLError where a bf16, f16 or f32 array holds NaN or infinity; works in pieces,
    without large temporaries."""
    exponent = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}[value.dtype.name]
    bits = (
        np.ascontiguousarray(value)
        .reshape(-1)
        .view(np.uint16 if value.dtype.itemsize == 2 else np.uint32)
    )
    for start in range(0, bits.size, 1 << 18):
        bad = (bits[start : start + (1 << 18)] & exponent) == exponent
        if bad.any():
            at = np.unravel_index(start + int(bad.argmax()), value.shape)
            raise InfiniteVLError(
                f"{what} holds {value[at]} at {[int(i) for i in at]}",
                "these weights cannot compute anything: take an intact copy, or an earlier step of"
                " the training run",
            )


def open_source(folder: str | Path) -> Source:
    """The weights of a Hugging Face folder; safetensors are preferred to .bin files.

    Raises:
      InfiniteVLError: no weights, a damaged file, an index that names absent shards or does not
        agree with them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InfiniteVLError(
            f"{folder} is not a folder", "give a folder with config.json and *.safetensors"
        )
    for stem, suffix, opener in (
        ("model", ".safetensors", SafetensorsFile),
        ("pytorch_model", ".bin", TorchFile),
    ):
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if single.exists() and index.exists():
            raise InfiniteVLError(
                f"{folder} has both {single.name} and {index.name}",
                "keep the one that belongs to the model",
            )
        if index.exists():
            return _sharded(folder, index, opener)
        if single.exists():
            return Source(folder, [opener(single)], None)
        if shards := sorted(p for p in folder.glob(f"{stem}*{suffix}")):
            _complete(folder, shards)
            return Source(folder, [opener(path) for path in shards], None)
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json").get(
            "base_model_name_or_path"
        )  # shown, not opened
        raise InfiniteVLError(
            f"{folder} holds a LoRA adapter and no base weights",
            f"import the folder of {base or 'the base model'} with --adapter {folder}",
        )
    raise InfiniteVLError(
        f"{folder} has no weights",
        "expected model.safetensors, model.safetensors.index.json with its shards, or *.bin",
    )


class _Index(msgspec.Struct):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


def _sharded(folder: Path, index: Path, opener) -> Source:
    content = read_json(index, _Index)
    weight_map = content.weight_map
    names = sorted(set(weight_map.values()))
    for name in names:
        inside(folder, plain_name(name, str(index)))
    if absent := [name for name in names if not (folder / name).exists()]:
        raise InfiniteVLError(
            f"{index} names {len(absent)} absent of {len(names)} shards:"
            f" {', '.join(absent[:3])}{', ...' if len(absent) > 3 else ''}",
            "download the missing files into the same folder",
        )
    source = Source(folder, [opener(folder / name) for name in names], content.metadata or {})
    where = {raw: file.path.name for file, raw in source.names.values()}
    wrong = [
        f"{n} (index: {weight_map.get(n)}, file: {where.get(n)})"
        for n in {**weight_map, **where}
        if weight_map.get(n) != where.get(n)
    ]
    if wrong:
        raise InfiniteVLError(
            f"{index} and its shards disagree on {len(wrong)} tensors:"
            f" {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}",
            "download index and shards of the same model again",
        )
    return source


def _complete(folder: Path, shards: list[Path]) -> None:
    """Shards without an index: their own numbers say whether all are there."""
    there = {path.name for path in shards}
    for path in shards:
        if found := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(\.\w+)", path.name):
            stem, number, total, suffix = found.groups()
            wanted = (
                f"{stem}-{i:0{len(number)}}-of-{total}{suffix}" for i in range(1, int(total) + 1)
            )
            if absent := list(itertools.islice((name for name in wanted if name not in there), 3)):
                raise InfiniteVLError(
                    f"{folder} lacks the shards {', '.join(absent)}",
                    "download the missing files into the same folder",
                )


class TorchFile:
    """A torch .bin file of tensors, mapped; needs torch."""

    def __init__(self, path: Path):
        self.path, self.metadata = path, {}
        try:
            import torch
        except ImportError:
            raise InfiniteVLError(
                f"{path} is a torch file, and torch is not installed",
                "pip install torch, or convert the weights to safetensors where torch is"
                " (save_pretrained writes them)",
            ) from None
        self._torch = torch
        open_file(path).close()  # torch would wait for a pipe
        try:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                state = torch.load(
                    path, map_location="cpu", weights_only=True
                )  # files from before torch 1.6 cannot be mapped
        except Exception as error:  # torch raises whatever its unpickler met
            reason = (
                str(error).strip().splitlines()[0][:200]
                if str(error).strip()
                else type(error).__name__
            )
            raise InfiniteVLError(
                f"{path} cannot be read by torch.load(weights_only=True): {reason}", _AGAIN
            ) from None
        if not isinstance(state, dict) or not all(
            isinstance(v, torch.Tensor) for v in state.values()
        ):
            raise InfiniteVLError(
                f"{path} does not hold a dictionary of tensors",
                "save model.state_dict(), or use save_pretrained",
            )
        for name, value in state.items():
            dense = (
                value.layout == torch.strided
                and value.device.type == "cpu"
                and not value.is_quantized
            )
            if (
                not isinstance(name, str)
                or not dense
                or value.untyped_storage().nbytes() < value.numel() * value.itemsize
            ):
                raise InfiniteVLError(
                    f"{path}: {name!r} is no plain tensor with all its numbers",
                    "save model.state_dict() from the CPU",
                )
        self._state = state
        self.entries = {name: _TorchEntry(tensor) for name, tensor in state.items()}

    def array(self, name: str) -> np.ndarray:
        """A view of a tensor in the mapped file."""
        tensor = self._state[name].detach()
        if tensor.dtype == self._torch.bfloat16:
            return tensor.view(self._torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


class _TorchEntry:
    """Shape and dtype of a torch tensor in numpy's terms."""

    def __init__(self, tensor):
        self.shape = tuple(tensor.shape)
        name = str(tensor.dtype).removeprefix("torch.")
        try:
            self.dtype = np.dtype(getattr(ml_dtypes, name, name))
        except TypeError:
            self.dtype = name


def index_json(weight_map: dict[str, str], metadata: dict) -> str:
    """Text of a model.safetensors.index.json."""
    return (
        json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        + "\n"
    )


def respell(name: str, spelling: str) -> str:
    """A hub name in `spelling`."""
    return runtime_name(name) if spelling == RUNTIME else name
