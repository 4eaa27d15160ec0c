"""PEFT's adapter_config.json: the keys that a merge needs, and the refusal of all that means more
than W + scale * B A."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import regex
from msgspec import Meta

from infinitevl_jax.config.lora import Rank, lora_scale
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import convert, read_json

Alpha = Annotated[float, Meta(ge=-1e6, le=1e6)]
Pattern = Annotated[str, Meta(min_length=1, max_length=500)]

_SECONDS = 2.0  # for all patterns of an adapter on all its modules: PEFT's own take microseconds

# Keys that say how the adapter was trained, and nothing about what it computes once it is trained.
_TRAINING = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode"
    " layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core"
    " peft_version qalora_group_size revision runtime_config target_modules task_type".split()
)
# Initialisations that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA, MiCA, ...) train beside a changed base, which is not saved.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
_MERGE = "merge it with peft (merge_and_unload) and import that"


class AdapterConfig(msgspec.Struct):
    """The keys that a merge needs, with PEFT's defaults."""

    r: Rank = 8
    lora_alpha: Alpha = 8
    use_rslora: bool = False
    rank_pattern: dict[Pattern, Rank] | None = None
    alpha_pattern: dict[Pattern, Alpha] | None = None
    init_lora_weights: bool | str = True
    peft_type: str = "LORA"
    bias: str = "none"
    fan_in_fan_out: bool = False  # PEFT has it for GPT-2's layers, and sets it back on linear ones


def read_adapter_config(path: Path) -> AdapterConfig:
    """The configuration of a LoRA adapter that can be merged as W + scale * B A.

    Raises:
      InfiniteVLError: another kind of adapter, a value out of range, or a key that asks for more,
        known here or not, and is not at its default (null, false, empty).
    """
    content = {key: value for key, value in read_json(path).items() if value is not None}
    kind = content.get("peft_type", "LORA")
    if kind != "LORA":
        raise InfiniteVLError(f"{path}: peft_type is {kind!r}", "only LORA adapters can be merged")
    config = convert(content, AdapterConfig, str(path))
    if config.init_lora_weights not in _INITIALISATIONS:
        raise InfiniteVLError(
            f"{path}: init_lora_weights is {config.init_lora_weights!r}, which changes the base"
            " model's weights",
            "save it with peft as a plain adapter (save_pretrained with"
            " path_initial_model_for_weight_conversion)",
        )
    unknown = {
        key: content[key]
        for key in sorted(set(content) - set(config.__struct_fields__) - _TRAINING)
    }
    plain = {"bias": config.bias == "none", "fan_in_fan_out": not config.fan_in_fan_out}
    plain |= {key: value is False or value in ("", [], {}) for key, value in unknown.items()}
    for key, is_plain in plain.items():
        if not is_plain:
            raise InfiniteVLError(
                f"{path}: {key} is {content[key]!r}, which is not plain LoRA", _MERGE
            )
    return config


class Scales:
    """Rank and scale of each module of an adapter, as PEFT finds them."""

    def __init__(self, config: AdapterConfig, path: Path):
        self._config, self._path = config, path
        self._deadline = time.monotonic() + _SECONDS
        self._ranks = self._compiled("rank_pattern", config.rank_pattern or {})
        self._alphas = self._compiled("alpha_pattern", config.alpha_pattern or {})

    def of(self, module: str) -> tuple[int, float]:
        """(r, scale) of a module."""
        rank = self._first("rank_pattern", self._ranks, module, self._config.r)
        alpha = self._first("alpha_pattern", self._alphas, module, self._config.lora_alpha)
        return rank, lora_scale(rank, alpha, self._config.use_rslora)

    def _compiled(self, key: str, patterns: Mapping[str, Any]) -> list[tuple[Any, Any]]:
        out = []
        for pattern, value in patterns.items():
            try:
                out.append((regex.compile(rf"(.*\.)?({pattern})$"), value))
            except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
                raise InfiniteVLError(
                    f"{self._path}: {key} {pattern!r} is no expression: {error}", _MERGE
                ) from None
            self._check_time(key, pattern)
        return out

    def _first(self, key: str, patterns: list[tuple[Any, Any]], module: str, default):
        """PEFT's rule: the first pattern that matches the end of the module's name."""
        for pattern, value in patterns:
            self._check_time(key, pattern.pattern)
            try:
                found = pattern.match(module, timeout=max(self._deadline - time.monotonic(), 1e-3))
            except (TimeoutError, MemoryError):
                self._deadline = 0.0
                self._check_time(key, pattern.pattern)
            if found:
                return value
        return default

    def _check_time(self, key: str, pattern: str) -> None:
        if time.monotonic() > self._deadline:
            raise InfiniteVLError(
                f"{self._path}: {key} takes more than {_SECONDS:g} seconds to match, at"
                f" {pattern!r}",
                "write the modules' names instead of expressions",
            )
