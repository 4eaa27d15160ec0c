"""config.json and generation_config.json, flat as published and nested as newer writers have it."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from infinitevl_jax.config.model import ModelConfig

from ..case import Case, Place
from ..content import mutate_bytes, mutate_file
from ..values import mutate, read
from .folders import CONFIG, as_torch, different, one_file, parameters, tensors

_ROOT = (
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "model_type",
    "architectures",
    "auto_map",
)
_TEXT = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
)
_TEXT += ("num_linear_heads", "linear_head_dim", "norm_eps", "expand_v")
_SEEING = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "patch_size",
    "window_size",
    "out_hidden_size",
    "tokens_per_second",
)
_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_REAL = ("rms_norm_eps", "norm_eps", "rope_theta", "expand_v", "tokens_per_second")

# Keys of config.json -> what the configuration says of them.
SAYS: dict[tuple[str, ...], Callable[[ModelConfig], Any]] = {
    **{(name,): lambda c, n=name: getattr(c.text, n) for name in _TEXT},
    **{("vision_config", name): lambda c, n=name: getattr(c.vision, n) for name in _SEEING},
    **{(name,): lambda c, n=name: getattr(c, n) for name in _IDS},
    ("num_hidden_layers",): lambda c: len(c.text.layer_types),
    ("rope_scaling", "mrope_section"): lambda c: list(c.text.mrope_section),
    ("vision_config", "fullatt_block_indexes"): lambda c: list(c.vision.fullatt_block_indexes),
}
KEYS = (
    *_TEXT,
    *_IDS,
    "layer_types",
    "head_dim",
    "num_linear_key_value_heads",
    "conv_size",
    "hidden_act",
    "attention_bias",
    "quantization_config",
)
KEYS += (
    "text_config",
    "vision_config",
    "rope_parameters",
    "rope_scaling",
    "partial_rotary_factor",
    "eos_token_id",
    "pad_token_id",
    "use_sliding_window",
)
KEYS += (
    "tie_word_embeddings",
    "initializer_range",
    "temporal_patch_size",
    "spatial_merge_size",
    "layer_norm_eps",
    "torch_dtype",
    "dtype",
)


def nested_config() -> dict:
    """CONFIG as transformers 5 writes it."""
    text = {
        key: value
        for key, value in CONFIG.items()
        if key not in (*_ROOT, "rope_scaling", "rope_theta", "torch_dtype")
    }
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [2, 3, 3],
    }
    return {key: CONFIG[key] for key in _ROOT} | {
        "text_config": text,
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
    }


def make(rng: Random, place: Place) -> Case:
    folder = place.copy("one-file", one_file)
    path = folder / "config.json"
    if rng.random() < 0.3:
        path.write_text(json.dumps(nested_config()))
    if rng.random() < 0.15:
        path = folder / "generation_config.json"
    content = json.loads(path.read_text())
    kind = rng.random()
    if kind < 0.05:
        label = mutate_file(rng, path, place.work / "outside")
    elif kind < 0.1:
        data, label = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
    else:
        inside = content.get("text_config", content)
        focus = [(key,) for key in content] + [
            ("vision_config", key) for key in content.get("vision_config", ())
        ]
        focus += (
            [("text_config", key) for key in inside]
            if inside is not content
            else [("rope_scaling", "mrope_section")] * ("rope_scaling" in content)
        )
        changed = mutate(rng, content, focus=focus, keys=KEYS)
        path.write_bytes(changed.data)
        label = changed.label
    return Case(
        f"{path.name}: {label}", lambda: parameters(folder), lambda found: _check(found, folder)
    )


def _check(found, folder: Path) -> str:
    config, params = found
    if wrong := different(
        as_torch(params, config),
        {n: v for n, v in tensors(mixed=True).items() if n != "lm_head.weight"},
    ):
        return wrong
    content = read(folder / "config.json")
    nested = content.get("text_config")
    inner = isinstance(nested, dict) and nested.get("rope_parameters")
    for path, says in SAYS.items():
        if inner and path == ("rope_theta",):  # rope_parameters says it
            continue
        value = _find(content, path)
        name = ".".join(path)
        if value is None or (path[0] == "vision_config" and config.vision is None):
            continue
        if (
            isinstance(value, list)
            and path[-1] not in ("mrope_section", "fullatt_block_indexes")
            and len(set(map(str, value))) == 1
        ):
            value = value[0]  # patch_size: [14, 14]
        if isinstance(value, bool) or not isinstance(value, int | float | list):
            return f"a value of another type was accepted: {name} = {value!r:.50}"
        if says(config) != value:
            return f"the file says something else: {name} = {value!r:.50}, read {says(config)!r}"
        least = 1e-300 if path[-1] in _REAL and not path[-1].endswith("eps") else 0
        most = 1e300 if path[-1] in _REAL else 2**31 - 1
        if not isinstance(value, list) and not least <= value <= most:
            return f"a value out of range was accepted: {name} = {value!r}"
    return _check_ends(config, folder, content)


def _check_ends(config: ModelConfig, folder: Path, content: dict) -> str:
    generation = read(folder / "generation_config.json")
    ends = generation.get("eos_token_id")
    ends = _find(content, ("eos_token_id",)) if ends is None else ends
    if ends is None:
        return ""
    ends = ends if isinstance(ends, list) else [ends]
    ends = [int(e) if isinstance(e, float) and e.is_integer() else e for e in ends]  # 14.0 is 14
    if any(isinstance(e, bool) or not isinstance(e, int) or not 0 <= e < 2**31 for e in ends):
        return f"end tokens that are no ids were accepted: {ends!r:.60}"
    return (
        ""
        if sorted(set(config.eos_token_ids)) == sorted(set(ends))
        else f"other end tokens: {config.eos_token_ids} for {ends!r:.60}"
    )


def _find(content: dict, path: tuple[str, ...]) -> Any:
    """A key's value where a reader finds it first; null is as good as absent."""
    nested = content.get("text_config")
    for scope in (
        (nested, content) if isinstance(nested, dict) and path[0] not in _ROOT else (content,)
    ):
        for key in path:
            scope = scope.get(key) if isinstance(scope, dict) else None
        if scope is not None:
            return scope
    return None
