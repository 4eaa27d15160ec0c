"""Hugging Face's config.json <-> ModelConfig.

Families: infinite_vl (and its LongSFT sibling), qwen2_5_vl, qwen2. Files come flat (published) or
  with a nested `text_config` and
`rope_parameters` (newer writers); both are read, the flat shape is written. A key that changes
nothing is ignored; one that changes the maths must hold the value this package computes with.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from infinitevl_jax.config.model import (
    FULL,
    LINEAR,
    SLIDING,
    ModelConfig,
    TextConfig,
    VisionConfig,
    hybrid_pattern,
)
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.huggingface_keys import (
    TEXT_VALUES,
    VISION_VALUES,
    RopeKeys,
    TextKeys,
    TieKeys,
    TokenKeys,
    VisionKeys,
)
from infinitevl_jax.reading import convert, read_json

K = TypeVar("K", bound=msgspec.Struct)

ARCHITECTURES = {
    "infinite_vl": "InfiniteVLQwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
}


class _Keys:
    """Several objects of a file, read as one: the first that has a key (not null) wins."""

    def __init__(self, source: str, *scopes: Mapping[str, Any]):
        self.source, self.scopes = source, scopes
        self.merged = {
            name: _plain(value)
            for scope in reversed(scopes)
            for name, value in scope.items()
            if value is not None
        }

    def read(self, kind: type[K]) -> K:
        """The keys that `kind` declares, checked."""
        return convert(self.merged, kind, self.source)

    def check(self, table: Mapping[str, tuple]) -> None:
        for name, value in ((name, scope.get(name)) for name in table for scope in self.scopes):
            accepted = table[name]
            if value is not None and value not in accepted:
                have = (
                    f"has to be {' or '.join(repr(a) for a in accepted)}"
                    if accepted
                    else "has to be absent or null"
                )
                shown = (
                    f"{{{', '.join(map(repr, list(value)[:3]))}, ...}}"
                    if isinstance(value, dict)
                    else repr(value)
                )
                raise InfiniteVLError(
                    f"{self.source}: {name} = {shown} changes the maths in a way that is not"
                    " implemented",
                    f"{name} {have}: use weights trained that way"
                    + (" (or dequantised to bf16)" if name == "quantization_config" else "")
                    + "; delete the key only if the weights do not use it",
                )


def _plain(value: Any) -> Any:
    """A whole number without its point: some writers have 14.0 for 14."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**63
    return int(value) if whole else value


@contextlib.contextmanager
def _naming(source: str):
    """Errors of the configuration classes, with the file's name in front."""
    try:
        yield
    except InfiniteVLError as error:
        if error.culprit.startswith(source):
            raise
        raise InfiniteVLError(f"{source}: {error.culprit}", error.cure) from None


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder: its config.json, and the end tokens of
    generation_config.json where there is one."""
    folder = Path(folder)
    hf = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return model_config(
        hf, str(folder / "config.json"), read_json(generation) if generation.exists() else None
    )


def model_config(
    hf: Mapping[str, Any], source: str = "config.json", generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """ModelConfig of a Hugging Face configuration.

    Args:
      hf: config.json as a dictionary, flat or with a nested text_config.
      source: name of the file, for messages.
      generation: generation_config.json, whose end and pad tokens win over config.json's.

    Raises:
      InfiniteVLError: another family, a size that is missing, or a key that changes the maths.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise InfiniteVLError(
            f"{source}: model_type is {family!r}"
            + (f" (architectures {hf['architectures']})" if hf.get("architectures") else ""),
            f"this package reads the families {', '.join(ARCHITECTURES)}",
        )
    for name in ("text_config", "vision_config"):
        if not isinstance(hf.get(name) or {}, Mapping):
            raise InfiniteVLError(
                f"{source}: {name} is a {type(hf[name]).__name__}", "it has to be an object"
            )
    nested = hf.get("text_config") or {}
    keys = _Keys(source, nested, hf)
    keys.check(TEXT_VALUES)
    text = keys.read(TextKeys)

    # Files written before transformers 5 say it in text_config, later ones at the root.
    inner, outer = (
        _Keys(source, scope).read(TieKeys).tie_word_embeddings for scope in (nested, hf)
    )
    tied = bool(inner or (family == "infinite_vl" if outer is None else outer))
    tokens = _Keys(f"{source} / generation_config.json", generation or {}, nested, hf).read(
        TokenKeys
    )
    eos = tokens.eos_token_id
    if eos is None:  # said to be none, or never said
        eos = (
            []
            if family == "qwen2" or "eos_token_id" in {**hf, **nested}
            else list(ModelConfig.eos_token_ids)
        )
    with _naming(source):
        vision = _vision(hf, family, source, text.hidden_size)
        pad = tokens.pad_token_id if tokens.pad_token_id is not None else ModelConfig.pad_token_id
        return ModelConfig(
            text=TextConfig(
                **_text(keys, text, family, vision is not None), tie_word_embeddings=tied
            ),
            vision=vision,
            family=family,
            **_given(tokens, TOKEN_IDS),
            # Pads never reach the maths; an id outside the table would only break the look-up.
            pad_token_id=pad if 0 <= pad < text.vocab_size else 0,
            eos_token_ids=tuple(eos if isinstance(eos, list) else [eos]),
            **_given(text, ("initializer_range",)),
        )


TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _given(keys: msgspec.Struct, names: Sequence[str]) -> dict[str, Any]:
    """Those of the keys that the file has; the others keep the default of the configuration
    class."""
    return {name: getattr(keys, name) for name in names if getattr(keys, name) is not None}


def _text(keys: _Keys, text: TextKeys, family: str, has_vision: bool) -> dict[str, Any]:
    source, hidden, heads = keys.source, text.hidden_size, text.num_attention_heads
    if hidden % heads and text.head_dim is None:
        raise InfiniteVLError(
            f"{source}: hidden_size {hidden} over num_attention_heads {heads} is no whole number",
            "correct one of them",
        )
    head_dim = text.head_dim or hidden // heads
    theta, section = _rope(keys, family, has_vision, head_dim)
    gated_delta = {}
    if family == "infinite_vl":
        gated_delta = _given(
            text, ("conv_size", "num_linear_heads", "linear_head_dim", "expand_v", "norm_eps")
        )
        linear_heads = gated_delta.get("num_linear_heads", TextConfig.num_linear_heads)
        if text.num_linear_key_value_heads not in (None, linear_heads):
            raise InfiniteVLError(
                f"{source}: num_linear_key_value_heads {text.num_linear_key_value_heads} differs"
                f" from num_linear_heads {linear_heads}",
                "grouped heads in Gated DeltaNet are not implemented: both have to be equal",
            )
    return {
        "layer_types": _layer_types(source, text, family),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": text.num_key_value_heads or heads,
        "head_dim": head_dim,
        "vocab_size": text.vocab_size,
        "intermediate_size": text.intermediate_size,
        **_given(text, ("sliding_window",)),
        "rope_theta": theta,
        "mrope_section": section,
        "rms_norm_eps": (
            text.rms_norm_eps
            if text.rms_norm_eps is not None
            else (1e-5 if family == "qwen2_5_vl" else 1e-6)
        ),
        **gated_delta,
    }


def _layer_types(source: str, text: TextKeys, family: str) -> tuple[str, ...]:
    types, depth = text.layer_types, text.num_hidden_layers
    if types is not None and len(types) != depth:
        raise InfiniteVLError(
            f"{source}: layer_types names {len(types)} layers, num_hidden_layers is {depth}",
            "give one type for every layer",
        )
    if family == "infinite_vl":
        # The authors' training code calls the windowed layers full_attention: only one kind of
        # softmax layer exists.
        return (
            hybrid_pattern(depth)
            if types is None
            else tuple(SLIDING if kind == FULL else kind for kind in types)
        )
    window = text.use_sliding_window and text.sliding_window is not None
    if types is None:
        usual = 28 if family == "qwen2" else 80
        first = (
            (usual if text.max_window_layers is None else text.max_window_layers)
            if window
            else depth
        )
        return tuple(SLIDING if i >= first else FULL for i in range(depth))
    if LINEAR in types:
        raise InfiniteVLError(
            f"{source}: layer_types has {LINEAR} in a {family} model",
            "hybrid models have model_type infinite_vl",
        )
    if SLIDING in types and not window:
        raise InfiniteVLError(
            f"{source}: layer_types has {SLIDING}, but use_sliding_window is"
            f" {text.use_sliding_window} and sliding_window {text.sliding_window}",
            "set use_sliding_window to true and sliding_window to the window's length",
        )
    return tuple(types)


def _rope(
    keys: _Keys, family: str, has_vision: bool, head_dim: int
) -> tuple[float, tuple[int, int, int] | None]:
    source, ropes = keys.source, []
    for name in ("rope_scaling", "rope_parameters"):
        rope = keys.merged.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise InfiniteVLError(f"{source}: {name} is {rope!r}", "it has to be an object")
        by_kind = [
            value for value in rope.values() if isinstance(value, Mapping)
        ]  # one object for each kind of layer
        if any(value != by_kind[0] for value in by_kind):
            raise InfiniteVLError(
                f"{source}: {name} differs between kinds of layers",
                "one rotary embedding serves all layers here",
            )
        ropes.append(by_kind[0] if by_kind else rope)
        used = _Keys(f"{source}: {name}", ropes[-1])
        accepted = ("default",) if family == "qwen2" else ("default", "mrope")
        used.check(
            {
                "rope_type": accepted,
                "type": accepted,
                "partial_rotary_factor": (1,),
                "mrope_interleaved": (False,),
            }
        )
    theta = _Keys(source, *ropes, *keys.scopes).read(RopeKeys).rope_theta or (
        1e4 if family == "qwen2" else 1e6
    )
    section = _Keys(f"{source}: rope_scaling", *ropes).read(RopeKeys).mrope_section
    if family == "qwen2" or (section is None and not has_vision):
        return theta, None
    if section is None and head_dim == 128:
        section = TextConfig.mrope_section
    if section is None:
        raise InfiniteVLError(
            f"{source}: mrope_section is None",
            "rope_scaling has to give three whole numbers, e.g. [16, 24, 24]",
        )
    return theta, section


def _vision(
    hf: Mapping[str, Any], family: str, source: str, hidden_size: int
) -> VisionConfig | None:
    if family == "qwen2" or (
        family == "infinite_vl" and "vision_config" in hf and hf["vision_config"] is None
    ):
        return None
    if not hf.get("vision_config"):
        raise InfiniteVLError(
            f"{source} has no vision_config",
            "take the config.json that was published with the weights"
            + (" (null: text only)" if family == "infinite_vl" else ""),
        )
    content = dict(hf["vision_config"])
    patch = content.get("patch_size")
    if isinstance(patch, list) and patch and all(side == patch[0] for side in patch):
        content["patch_size"] = patch[0]  # [14, 14]
    keys = _Keys(f"{source}: vision_config", content)
    keys.check(VISION_VALUES)
    rope = keys.merged.get("rope_parameters") or {}
    if not isinstance(rope, Mapping):
        raise InfiniteVLError(
            f"{keys.source}: rope_parameters is {rope!r}", "it has to be an object"
        )
    ropes = _Keys(f"{keys.source}.rope_parameters", rope)
    ropes.check({"rope_type": ("axial", "default"), "partial_rotary_factor": (1,)})
    vision = keys.read(VisionKeys)
    default = {
        "out_hidden_size": hidden_size,
        "tokens_per_second": 4.0 if family == "qwen2_5_vl" else 2.0,
        "rope_theta": ropes.read(RopeKeys).rope_theta or 1e4,
    }
    return VisionConfig(**default | _given(vision, vision.__struct_fields__))


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """config.json (flat, as published) of a model that was born here. `model_config` reads it back
    to an equal ModelConfig."""
    text, family = config.text, config.family
    if family not in ARCHITECTURES:
        raise InfiniteVLError(
            f"family {family!r} has no config.json", f"choose one of {', '.join(ARCHITECTURES)}"
        )
    if family == "infinite_vl" and FULL in text.layer_types:
        raise InfiniteVLError(
            f"layer_types has {FULL}, which infinite_vl cannot say on disk",
            f"use {SLIDING} and a long sliding_window",
        )
    if family != "infinite_vl" and LINEAR in text.layer_types:
        raise InfiniteVLError(
            f"layer_types has {LINEAR}, which {family} cannot say on disk",
            "use the family infinite_vl",
        )
    parts = (config.vision is not None, text.mrope_section is not None)
    if family != "infinite_vl" and parts != (family == "qwen2_5_vl",) * 2:
        raise InfiniteVLError(
            f"family {family} with vision {config.vision} and mrope_section {text.mrope_section}",
            "qwen2 has neither vision nor mrope_section, qwen2_5_vl has both",
        )
    window = SLIDING in text.layer_types
    eos = list(config.eos_token_ids)
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "attention_dropout": 0.0,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": config.pad_token_id,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": 128000,
        "max_window_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "layer_types": list(text.layer_types),
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope_theta,
        "sliding_window": text.sliding_window,
        "use_sliding_window": window,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": text.vocab_size,
    }
    if text.head_dim != text.hidden_size // text.num_attention_heads:
        out["head_dim"] = text.head_dim
    if text.mrope_section is not None:
        out["rope_scaling"] = {"type": "mrope", "mrope_section": list(text.mrope_section)}
    if family == "infinite_vl":
        for name in ("conv_size", "expand_v", "num_linear_heads", "linear_head_dim", "norm_eps"):
            out[name] = getattr(text, name)
        out["num_linear_key_value_heads"] = text.num_linear_heads
        out["vision_config"] = None
    if config.vision is not None:
        out |= {name: getattr(config, name) for name in TOKEN_IDS}
        out["vision_config"] = _vision_to_huggingface(config.vision, family)
    return out


def _vision_to_huggingface(vision: VisionConfig, family: str) -> dict[str, Any]:
    names = (
        "depth hidden_size intermediate_size num_heads in_channels patch_size temporal_patch_size"
        " spatial_merge_size window_size"
    )
    out = {"model_type": family, "hidden_act": "silu"} | {
        name: getattr(vision, name) for name in names.split()
    }
    out |= {
        "out_hidden_size": vision.out_hidden_size,
        "fullatt_block_indexes": list(vision.fullatt_block_indexes),
    }
    rate = vision.tokens_per_second
    out["tokens_per_second"] = int(rate) if rate == int(rate) else rate
    if vision.rms_norm_eps != 1e-6:
        out["rms_norm_eps"] = vision.rms_norm_eps
    if vision.rope_theta != 1e4:
        out["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.rope_theta}
    return out
