"""LoRA adapters: adapter_config.json, adapter_model.safetensors, and what merging them gives."""

import json
import math
import re
from pathlib import Path
from random import Random

import numpy as np
import safetensors
from torch_folders import safetensors_bytes

from ..case import Case, Place
from ..content import mutate_bytes, mutate_file
from ..values import mutate, read
from .folders import as_torch, one_file, parameters, tensors
from .safetensors import mutate_weights

# What LoraConfig writes, at its defaults; what is not here decides nothing about the sum, or is
# looked at below.
DEFAULTS = {
    "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": "base", "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
    "modules_to_save": None, "r": 4, "revision": None, "target_modules": ["q_proj", "up_proj"],
    "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False, "alpha_pattern": {},
    "rank_pattern": {}, "exclude_modules": None, "eva_config": None,
    "trainable_token_indices": None,
}  # fmt: skip
CHANGES_THE_SUM = {
    "use_dora": True, "fan_in_fan_out": True, "bias": "all", "lora_bias": True,
    "layer_replication": [[0, 2]], "modules_to_save": ["lm_head"], "init_lora_weights": "pissa",
    "trainable_token_indices": [1], "alora_invocation_tokens": [1, 2], "use_qalora": True,
    "peft_type": "VERA", "target_parameters": ["w"],
    "arrow_config": {"a": 1}, "use_bdlora": {"a": 1}, "zzz": 3,
}  # fmt: skip
PATTERNS = [
    "(",
    "(.*)*x",
    "[",
    ".*",
    "q_proj",
    "layers.0.self_attn.q_proj",
    "",
    "\0",
    "(a+)+$",
    "x" * 5000,
]
PREFIX = "base_model.model.model.layers."


def matrices(seed: int = 3) -> dict[str, np.ndarray]:
    rng, out = np.random.default_rng(seed), {}
    for module, width in (("0.self_attn.q_proj", 32), ("0.mlp.up_proj", 48), ("1.mlp.up_proj", 48)):
        out[f"{PREFIX}{module}.lora_A.weight"] = rng.normal(size=(4, 32)).astype(np.float32)
        out[f"{PREFIX}{module}.lora_B.weight"] = rng.normal(size=(width, 4)).astype(np.float32)
    return out


def write(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(DEFAULTS))
    (folder / "adapter_model.safetensors").write_bytes(
        safetensors_bytes(matrices(), {"format": "pt"})
    )


def make(rng: Random, place: Place) -> Case:
    base, folder = place.copy("one-file", one_file), place.copy("adapter", write, "adapter")
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    content, must_refuse = json.loads(path.read_text()), ""
    kind = rng.choice(
        ["json"] * 4
        + [
            "sum",
            "sum",
            "alpha",
            "alpha",
            "pattern",
            "pattern",
            "names",
            "names",
            "weights",
            "weights",
            "bytes",
            "file",
        ]
    )
    if kind == "json":
        focus = [
            (key,)
            for key in (
                "r",
                "lora_alpha",
                "use_rslora",
                "peft_type",
                "rank_pattern",
                "alpha_pattern",
                "bias",
                "init_lora_weights",
            )
        ]
        changed = mutate(
            rng,
            content,
            focus=focus,
            keys=(*CHANGES_THE_SUM, "megatron_config", "qalora_group_size"),
        )
        path.write_bytes(changed.data)
        label = changed.label
    elif kind == "sum":
        key = rng.choice(list(CHANGES_THE_SUM))
        content[key] = CHANGES_THE_SUM[key]
        label = must_refuse = f"{key} = {content[key]}"
    elif kind == "alpha":
        key = rng.choice(["lora_alpha", "r"])
        content[key] = rng.choice(
            [
                0,
                -1,
                1e-30,
                1e30,
                1e38,
                1e308,
                float("nan"),
                float("inf"),
                2**70,
                8.5,
                True,
                "8",
                None,
                [8],
            ]
        )
        label = f"{key} = {content[key]!r}"
    elif kind == "pattern":
        key, pattern = rng.choice(["rank_pattern", "alpha_pattern"]), rng.choice(PATTERNS)
        content[key] = rng.choice(
            [
                {pattern: rng.choice([4, 8, 0, -1, float("nan"), "4", None, 1e308])},
                [pattern],
                pattern,
                [[pattern, 4]],
            ]
        )
        label = f"{key} = {content[key]!r:.80}"
    elif kind == "names":
        label = _rename(rng, weights)
    elif kind == "weights":
        label = mutate_weights(rng, weights, place.work / "outside")
    elif kind == "bytes":
        data, label = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
    else:
        label = mutate_file(rng, rng.choice([path, weights]), place.work / "outside")
    if kind in ("sum", "alpha", "pattern"):
        path.write_text(json.dumps(content))

    def check(found):
        return f"accepted as plain LoRA: {must_refuse}" if must_refuse else _check(found, folder)

    return Case(label, lambda: parameters(base, adapters=[folder]), check)


def _rename(rng: Random, weights: Path) -> str:
    """Matrices under other names, twice, in other shapes, or with numbers that overflow."""
    values = matrices()
    name = rng.choice(list(values))
    kind = rng.choice(["twice", "other", "lost", "shape", "dtype", "large", "module", "live"])
    if kind == "twice":
        values[name.replace(".weight", ".default.weight")] = values[name] * 0
    elif kind == "lost":
        del values[name]
    elif kind == "shape":
        values[name] = rng.choice(
            [
                values[name].T.copy(),
                values[name][:2],
                values[name][None],
                values[name].reshape(-1),
                values[name][:0],
            ]
        )
    elif kind == "dtype":
        values[name] = values[name].astype(rng.choice([np.float16, np.float64, np.int8]))
    elif kind == "large":
        values[name] = values[name] * np.float32(rng.choice([1e30, 1e38]))
    else:
        new = {
            "other": name.replace(
                "lora_A",
                rng.choice(["lora_C", "lora_embedding_A", "lora_a", "lora_magnitude_vector"]),
            ),
            "module": name.replace("_proj", "_prok"),
            "live": name.replace("model.model.layers", "model.model.language_model.layers"),
        }[kind]
        values[new] = values.pop(name)
    weights.write_bytes(safetensors_bytes(values))
    return f"{kind}: {name}"


def _check(found, folder: Path) -> str:
    """W + s B A in float32 of what the two files say, cast back to W's dtype."""
    config, params = found
    said = read(folder / "adapter_config.json")
    said = {"r": 8, "lora_alpha": 8} | {k: v for k, v in said.items() if v is not None}  # PEFT's
    try:
        with safetensors.safe_open(folder / "adapter_model.safetensors", "numpy") as file:
            values = {_published(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        return f"accepted what safetensors refuses: {error}"
    wanted = {n: v for n, v in tensors(mixed=True).items() if n != "lm_head.weight"}
    used = 0
    for name in [n for n in values if n.endswith("lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        weight = module + ".weight"
        a, b = (values[name.replace("lora_A", f"lora_{side}")].astype(np.float32) for side in "AB")
        rank, alpha = (
            _of(said, "rank_pattern", module, said.get("r")),
            _of(said, "alpha_pattern", module, said.get("lora_alpha")),
        )
        if (
            isinstance(rank, bool)
            or isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or rank != len(a)
            or not math.isfinite(alpha)
        ):
            return f"accepted rank or alpha: {rank!r}, {alpha!r:.50}"
        scale = alpha / (math.sqrt(rank) if said.get("use_rslora") else rank)
        used += 2
        wanted[weight] = (wanted[weight].astype(np.float32) + np.float32(scale) * (b @ a)).astype(
            wanted[weight].dtype
        )
    if used != len(values):
        return "some matrices were left out"
    for name, value in as_torch(params, config).items():
        want, got = wanted[name].astype(np.float32), value.astype(np.float32)
        if not np.isfinite(got).all():
            return f"merged to NaN or infinity: {name}"
        if not np.allclose(
            got,
            want,
            rtol=1e-2 if value.dtype.itemsize == 2 else 1e-5,
            atol=1e-6 * max(1, np.abs(want).max()),
        ):
            return f"merged to other numbers: {name}"
    return ""


def _published(name: str) -> str:
    """A matrix's name in the published spelling, without the adapter's own name."""
    name = name.replace(".default.weight", ".weight").replace("model.language_model.", "model.")
    return name.replace("model.visual.", "visual.")


def _of(said: dict, key: str, module: str, default):
    return next(
        (
            value
            for pattern, value in (said.get(key) or {}).items()
            if re.match(rf"(.*\.)?({pattern})$", module)
        ),
        default,
    )
