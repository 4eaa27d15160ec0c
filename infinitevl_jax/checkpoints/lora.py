"""PEFT LoRA adapters, merged into the weights as they are read: W + sum of scale * B A, in f32,
cast back to W's dtype once."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from infinitevl_jax.checkpoints.lora_config import Scales, read_adapter_config
from infinitevl_jax.checkpoints.safetensors_file import SafetensorsFile
from infinitevl_jax.checkpoints.source import FLOATS, Source, TorchFile, check_finite
from infinitevl_jax.checkpoints.weights import hub_name
from infinitevl_jax.errors import InfiniteVLError

_TENSOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)


class Adapter:
    """One adapter folder: adapter_config.json and adapter_model.safetensors (or .bin).

    Attributes:
      pairs: published name of the weight -> (A [r, in], B [out, r], scale).

    Raises:
      InfiniteVLError: not plain LoRA on linear layers, damaged, or not of one piece.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        config_path = folder / "adapter_config.json"
        scales = Scales(read_adapter_config(config_path), config_path)
        weights, torch_weights = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
        if not weights.exists() and not torch_weights.exists():
            raise InfiniteVLError(
                f"{folder} has no adapter_model.safetensors",
                "copy the adapter's weights beside adapter_config.json",
            )
        file = SafetensorsFile(weights) if weights.exists() else TorchFile(torch_weights)

        sides: dict[str, dict[str, str]] = {}  # weight -> side -> name in the file
        modules: dict[str, str] = {}  # weight -> module as this file spells it
        for name, entry in file.entries.items():
            found = _TENSOR.fullmatch(name)
            if not found or len(entry.shape) != 2 or entry.dtype not in FLOATS:
                raise InfiniteVLError(
                    f"{file.path}: {name} is not a LoRA matrix of a linear layer",
                    "merge it with peft (merge_and_unload) and import that",
                )
            weight = hub_name(found["module"] + ".weight")
            modules[weight] = found["module"]
            names = sides.setdefault(weight, {})
            if other := names.get(found["side"]):
                raise InfiniteVLError(
                    f"{file.path}: {name} and {other} are the same matrix",
                    "keep the one that belongs to the adapter",
                )
            names[found["side"]] = name
        if not sides:
            raise InfiniteVLError(
                f"{file.path} is empty", "take the file that was saved after training"
            )
        self.pairs = {
            weight: _pair(file, modules[weight], names, scales) for weight, names in sides.items()
        }


def _pair(
    file, module: str, names: dict[str, str], scales: Scales
) -> tuple[np.ndarray, np.ndarray, float]:
    if missing := {"A", "B"} - set(names):
        raise InfiniteVLError(
            f"{file.path}: {module} has no lora_{missing.pop()}", "copy the whole adapter again"
        )
    (rank, scale), shapes = (
        scales.of(module),
        {side: file.entries[name].shape for side, name in names.items()},
    )
    if shapes["A"][0] != rank or shapes["B"][1] != rank:
        raise InfiniteVLError(
            f"{file.path}: {module} has lora_A {list(shapes['A'])} and lora_B {list(shapes['B'])},"
            f" adapter_config.json says r = {rank}",
            "take adapter_config.json and weights of the same adapter",
        )
    values = {}
    for side, name in names.items():
        value = file.array(name)
        check_finite(np.asarray(value), f"{file.path}: tensor {name}")
        values[side] = np.asarray(value, np.float32)
    return values["A"], values["B"], scale


class Merged(Source):
    """A source whose tensors come with adapters added."""

    def __init__(self, source: Source, adapters: Sequence[Adapter]):
        super().__init__(source.folder, source.files, source.index_metadata)
        self.adapters = tuple(adapters)
        shapes = self.shapes
        for adapter in self.adapters:
            if lost := [name for name in adapter.pairs if name not in shapes]:
                raise InfiniteVLError(
                    f"{adapter.folder}: {len(lost)} of {len(adapter.pairs)} targets are not in"
                    f" {source.folder}: {', '.join(lost[:3])}",
                    "merge the adapter into the model it was trained on",
                )
            for name, (a, b, _) in adapter.pairs.items():
                if shapes[name] != (b.shape[0], a.shape[1]):
                    raise InfiniteVLError(
                        f"{adapter.folder}: the adapter of {name} is for"
                        f" {[b.shape[0], a.shape[1]]}, the weight is {list(shapes[name])}",
                        "merge the adapter into the model it was trained on",
                    )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        part = super().read(name, index)
        pairs = [adapter.pairs[name] for adapter in self.adapters if name in adapter.pairs]
        if not pairs:
            return part
        rows, columns = (*index, slice(None), slice(None))[:2]
        total = part.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # looked for below
            for a, b, scale in pairs:
                total += np.float32(scale) * (b[rows] @ a[:, columns])
            merged = total.astype(part.dtype)
        adapters = ", ".join(
            str(adapter.folder) for adapter in self.adapters if name in adapter.pairs
        )
        check_finite(merged, f"{name} with {adapters} merged in")
        return merged
