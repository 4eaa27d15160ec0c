"""PEFT adapter folders: written from a LoRA run, and read to train on."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Sharding

from infinitevl_jax.checkpoints.adapted import AdaptedReader
from infinitevl_jax.checkpoints.destination import new_folder
from infinitevl_jax.checkpoints.lora import Adapter
from infinitevl_jax.checkpoints.manifest import Lora, Manifest
from infinitevl_jax.checkpoints.placing import place
from infinitevl_jax.checkpoints.reading import read_config
from infinitevl_jax.checkpoints.safetensors_file import SafetensorsWriter
from infinitevl_jax.checkpoints.source import check_finite
from infinitevl_jax.checkpoints.stored import open_params
from infinitevl_jax.checkpoints.weights import leaves, runtime_name
from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families import family
from infinitevl_jax.nn.lora import A, B, is_adapter
from infinitevl_jax.nn.params import Parameter
from infinitevl_jax.reading import read_json

_SIDES = {A: "lora_A", B: "lora_B"}


def export_adapter(src: str | Path, dst: str | Path, *, overwrite: bool = False) -> Lora:
    """Write the adapter of a LoRA run as a PEFT folder.

    Its base is the checkpoint that the run began with; if other weights were trained too
    (`base_trained` of the result), the run's own: `export_folder(src, base, merge=False)`.

    Args:
      src: a step of a run.
      overwrite: replace a checkpoint folder at `dst`, once the new one is complete.

    Raises:
      InfiniteVLError: there is no adapter, or it is damaged.
    """
    src = Path(src)
    config, lora = read_config(src), Manifest.read(src).lora
    if lora is None:
        raise InfiniteVLError(
            f"{src} has no adapter", "name a run with [train.lora], or a step of one"
        )
    reader = open_params(src, config)
    assert isinstance(reader, AdaptedReader)
    torch = _modules(config, src)
    tensors = {}
    for module in reader.adapted:
        for side, spelled in _SIDES.items():
            value = np.asarray(reader.side(module, side), np.float32)
            check_finite(value, f"{reader.path}: {module}.{side}")
            tensors[f"base_model.model.{torch[module]}.{spelled}.weight"] = value.T
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.use_rslora,
        "lora_dropout": 0.0,
        "target_modules": _targets({torch[module] for module in reader.adapted}, torch.values()),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    needs = sum(value.nbytes for value in tensors.values())
    with new_folder(dst, overwrite=overwrite, inputs=(src,), needs=needs) as work:
        entries = [(name, value.dtype, value.shape) for name, value in tensors.items()]
        writer = SafetensorsWriter(work / "adapter_model.safetensors", entries, {"format": "pt"})
        try:
            for name, value in tensors.items():
                writer.put(name, value)
            writer.close()
        finally:
            writer.abort()
        (work / "adapter_config.json").write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    return lora


def _modules(config: ModelConfig, folder: Path) -> dict[str, str]:
    """Our name of a layer -> its module's name in transformers."""
    spelled = runtime_name if _has_language_model(config, folder) else str
    return {
        leaf.name.rpartition(".")[0]: spelled(leaf.torch[0]).removesuffix(".weight")
        for leaf in leaves(config, scanned=False)
        if leaf.torch[0].endswith(".weight")
    }


def _has_language_model(config: ModelConfig, folder: Path) -> bool:
    """Whether the module in transformers has the decoder in `model.language_model`."""
    if family(config.family).transformers_code is None:
        return config.vision is not None
    # an export brings code of ours, which has it in `model`, unless the source had its own
    own = [file.read_text("utf-8", "replace") for file in folder.glob("*.py")]
    return any("self.language_model" in text for text in own)


def _targets(chosen: set[str], modules) -> list[str]:
    """Modules as PEFT names them: by their last names if those mean no other module."""
    last = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name in modules if name.rpartition(".")[2] in last}
    return sorted(last if meant == chosen else chosen)


def load_adapter(
    lora: LoraConfig,
    config: ModelConfig,
    known: Mapping[str, Parameter],
    shardings: Mapping[str, Sharding],
) -> dict[str, jax.Array]:
    """The adapter in the PEFT folder `lora.from_`, to train on.

    Args:
      known: parameters of the model with adapters, in any layout.

    Raises:
      InfiniteVLError: it is not plain LoRA, or has other targets, ranks or scales than `lora`.
    """
    folder = Path(lora.from_ or "")
    adapter = Adapter(folder)
    if dropout := read_json(folder / "adapter_config.json").get("lora_dropout"):
        raise InfiniteVLError(
            f"{folder}: lora_dropout is {dropout}, adapters are trained without",
            "set it to 0 in a copy of the folder to go on without it",
        )
    torch = {leaf.name: leaf.torch[0] for leaf in leaves(config, scanned=False)}

    def weight(name: str) -> str:
        return torch[name.rpartition(".")[0] + ".kernel"]

    own = {name: known[name] for name in known if is_adapter(name)}
    wanted = {weight(layer) for parameter in own.values() for layer in parameter.layers}
    if strange := sorted(wanted ^ adapter.pairs.keys()):
        where = "train.lora.targets" if strange[0] in wanted else "the adapter"
        raise InfiniteVLError(
            f"{folder}: only {where} has {strange[0]}, and so with {len(strange)} in all",
            "give train.lora.targets that match the adapter's layers",
        )
    for name, (a, _, scale) in adapter.pairs.items():
        if len(a) != lora.rank or not np.isclose(scale, lora.scale, rtol=1e-6):
            raise InfiniteVLError(
                f"{folder}: {name} has rank {len(a)} and scale {scale:g}, train.lora gives"
                f" {lora.rank} and {lora.scale:g}",
                "give train.lora the rank, alpha and use_rslora of adapter_config.json; ranks that"
                " differ between layers cannot be trained on",
            )
    out = {}
    for name, parameter in own.items():
        side = (A, B).index(name.rpartition(".")[2])
        parts = [adapter.pairs[weight(layer)][side].T for layer in parameter.layers]
        shape = parameter.shape[-2:]
        if wrong := [part.shape for part in parts if part.shape != shape]:
            raise InfiniteVLError(
                f"{folder}: {name} is {list(wrong[0])}, the model's is {list(shape)}",
                "go on with the model that the adapter was trained on",
            )
        value = np.stack(parts) if parameter.stacked else np.ascontiguousarray(parts[0])
        out[name] = place(value.shape, shardings[name], partial(_part, value))
    return out


def _part(value: np.ndarray, index: tuple[slice, ...] | None) -> np.ndarray:
    return value if index is None else value[index]
