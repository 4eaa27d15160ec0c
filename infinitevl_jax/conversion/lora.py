"""PEFT LoRA adapters, merged into the weights as they are read: W + sum of scale * B A, in f32, cast back to W's dtype once."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from infinitevl_jax.conversion.safetensors_file import SafetensorsFile
from infinitevl_jax.conversion.source import FLOATS, Source, TorchFile, check_finite
from infinitevl_jax.conversion.weights import published
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import read_json

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# What would change the sum below: value that means "not used".
_UNUSED = {"use_dora": False, "fan_in_fan_out": False, "use_qalora": False, "lora_bias": False, "bias": "none", "layer_replication": None}


class Adapter:
    """One adapter folder: adapter_config.json and adapter_model.safetensors (or .bin).

    Attributes:
      pairs: published name of the weight -> (A [r, in], B [out, r], scale).
    """

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        config_path = folder / "adapter_config.json"
        config = read_json(config_path)
        if config.get("peft_type", "LORA") != "LORA":
            raise InfiniteVLError(f"{config_path}: peft_type is {config['peft_type']}", "only LORA adapters can be merged")
        for key, unused in _UNUSED.items():
            if config.get(key) not in (unused, None):
                raise InfiniteVLError(
                    f"{config_path}: {key} is {config[key]!r}, which is not plain LoRA",
                    "merge it with peft (merge_and_unload) and import that",
                )
        weights, torch_weights = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
        if not weights.exists() and not torch_weights.exists():
            raise InfiniteVLError(f"{folder} has no adapter_model.safetensors", "copy the adapter's weights beside adapter_config.json")
        file = SafetensorsFile(weights) if weights.exists() else TorchFile(torch_weights)

        sides: dict[str, dict[str, np.ndarray]] = {}
        for name in file.entries:
            found = _TENSOR.fullmatch(name)
            value = file.array(name)
            if not found or value.ndim != 2 or value.dtype not in FLOATS:
                raise InfiniteVLError(
                    f"{file.path}: {name} is not a LoRA matrix of a linear layer", "merge it with peft (merge_and_unload) and import that"
                )
            check_finite(np.asarray(value), f"{file.path}: tensor {name}")
            sides.setdefault(found["module"], {})[found["side"]] = np.asarray(value, np.float32)
        if not sides:
            raise InfiniteVLError(f"{file.path} is empty", "take the file that was saved after training")
        self.pairs = {published(module + ".weight"): self._pair(module, pair, config, file.path) for module, pair in sides.items()}

    def _pair(self, module: str, pair: dict[str, np.ndarray], config: dict, path: Path):
        if missing := {"A", "B"} - set(pair):
            raise InfiniteVLError(f"{path}: {module} has no lora_{missing.pop()}", "copy the whole adapter again")
        a, b = pair["A"], pair["B"]
        rank = _by_pattern(config, "rank_pattern", module, config.get("r"))
        alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
        if not isinstance(rank, int) or not isinstance(alpha, int | float) or a.shape[0] != rank or b.shape[1] != rank:
            raise InfiniteVLError(
                f"{path}: {module} has lora_A {list(a.shape)} and lora_B {list(b.shape)},"
                f" adapter_config.json says r = {rank!r}, lora_alpha = {alpha!r}",
                "take adapter_config.json and weights of the same adapter",
            )
        return a, b, float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _by_pattern(config: dict, key: str, module: str, default):
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    return next((value for pattern, value in (config.get(key) or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


class Merged(Source):
    """A source whose tensors come with adapters added."""

    def __init__(self, source: Source, adapters: Sequence[Adapter]):
        super().__init__(source.folder, source.files, source.index_metadata)
        self.adapters = tuple(adapters)
        shapes = self.shapes
        for adapter in self.adapters:
            if lost := [name for name in adapter.pairs if name not in shapes]:
                raise InfiniteVLError(
                    f"{adapter.folder}: {len(lost)} of {len(adapter.pairs)} targets are not in {source.folder}: {', '.join(lost[:3])}",
                    "merge the adapter into the model it was trained on",
                )
            for name, (a, b, _) in adapter.pairs.items():
                if shapes[name] != (b.shape[0], a.shape[1]):
                    raise InfiniteVLError(
                        f"{adapter.folder}: the adapter of {name} is for {[b.shape[0], a.shape[1]]}, the weight is {list(shapes[name])}",
                        "merge the adapter into the model it was trained on",
                    )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        part = super().read(name, index)
        pairs = [adapter.pairs[name] for adapter in self.adapters if name in adapter.pairs]
        if not pairs:
            return part
        rows, columns = (*index, slice(None), slice(None))[:2]
        total = part.astype(np.float32)
        for a, b, scale in pairs:
            total += scale * (b[rows] @ a[:, columns])
        return total.astype(part.dtype)
