"""Hugging Face's config.json <-> ModelConfig.

Families: infinite_vl (and its LongSFT sibling), qwen2_5_vl, qwen2. Files come flat (published) or with a nested `text_config` and
`rope_parameters` (newer writers); both are read, the flat shape is written. A key that changes nothing is ignored; one that changes
the maths must hold the value this package computes with.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infinitevl_jax.config.model import FULL, LINEAR, SLIDING, ModelConfig, TextConfig, VisionConfig, hybrid_pattern
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import read_json

ARCHITECTURES = {
    "infinite_vl": "InfiniteVLQwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
}

# Keys that change the maths -> the values this package computes with (null and absent are always fine). What only adds or drops
# tensors (attention_bias, mlp_bias, ...) needs no line here: the weight table finds it.
_SILU = ("silu", "swish")
_TEXT_KEYS: dict[str, tuple] = {
    "hidden_act": _SILU,
    "hidden_activation": _SILU,
    "quantization_config": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "query_pre_attn_scalar": (),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0, 1),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "partial_rotary_factor": (1,),
    "alibi": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "attention_chunk_size": (),
    "num_attention_sinks": (0,),
    "attn_output_gate": (False,),
    # Gated DeltaNet, as its libraries spell the options
    "conv_size": (4,),
    "conv_bias": (False,),
    "use_short_conv": (True,),
    "use_gate": (True,),
    "use_qk_l2norm": (True,),
    "allow_neg_eigval": (False,),
}
_VISION_KEYS: dict[str, tuple] = {
    "hidden_act": _SILU,
    "quantization_config": (),
    "qkv_bias": (True,),
    "deepstack_visual_indexes": ([],),
}


class _Keys:
    """Looks a key up in several dictionaries, first one that has it (not null) wins; checks its type."""

    def __init__(self, source: str, *scopes: Mapping[str, Any]):
        self.source, self.scopes = source, scopes

    def find(self, name: str) -> Any:
        return next((scope[name] for scope in self.scopes if scope.get(name) is not None), None)

    def number(self, name: str, default: float | None = None, *, whole: bool = True) -> Any:
        value = self.find(name)
        if value is None:
            if default is None:
                raise InfiniteVLError(f"{self.source} has no {name}", "take the config.json that was published with the weights")
            return default
        if isinstance(value, list | tuple) and value and len(set(value)) == 1:  # patch_size: [14, 14]
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or (whole and value != int(value)) or value < 0:
            raise InfiniteVLError(f"{self.source}: {name} is {value!r}", f"write a {'whole ' if whole else ''}number, zero or above")
        return int(value) if whole else float(value)

    def check(self, table: Mapping[str, tuple]) -> None:
        for name, value in ((name, scope.get(name)) for name in table for scope in self.scopes):
            accepted = table[name]
            if value is not None and value not in accepted:
                have = f"has to be {' or '.join(repr(a) for a in accepted)}" if accepted else "has to be absent or null"
                shown = f"{{{', '.join(map(repr, list(value)[:3]))}, ...}}" if isinstance(value, dict) else repr(value)
                raise InfiniteVLError(
                    f"{self.source}: {name} = {shown} changes the maths in a way that is not implemented",
                    f"{name} {have}: use weights trained that way"
                    + (" (or dequantised to bf16)" if name == "quantization_config" else "")
                    + "; delete the key only if the weights do not use it",
                )


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
    """The ModelConfig of a checkpoint folder: its config.json, and the end tokens of generation_config.json where there is one."""
    folder = Path(folder)
    hf = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    return model_config(hf, str(folder / "config.json"), read_json(generation) if generation.exists() else None)


def model_config(hf: Mapping[str, Any], source: str = "config.json", generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """ModelConfig of a Hugging Face configuration.

    Args:
      hf: config.json as a dictionary, flat or with a nested text_config.
      source: name of the file, for messages.
      generation: generation_config.json, whose end and pad tokens win over config.json's.

    Raises:
      InfiniteVLError: another family, a size that is missing, or a key that changes the maths.
    """
    family = hf.get("model_type")
    if family not in ARCHITECTURES:
        raise InfiniteVLError(
            f"{source}: model_type is {family!r}" + (f" (architectures {hf['architectures']})" if hf.get("architectures") else ""),
            f"this package reads the families {', '.join(ARCHITECTURES)}",
        )
    nested = hf.get("text_config") or {}
    for name in ("text_config", "vision_config"):
        if not isinstance(hf.get(name) or {}, Mapping):
            raise InfiniteVLError(f"{source}: {name} is a {type(hf[name]).__name__}", "it has to be an object")
    keys = _Keys(source, nested, hf)
    keys.check(_TEXT_KEYS)

    # Files written before transformers 5 say it in text_config, later ones at the root.
    tied = bool(nested.get("tie_word_embeddings") or hf.get("tie_word_embeddings", family == "infinite_vl"))
    tokens = _Keys(f"{source} / generation_config.json", generation or {}, nested, hf)
    eos = tokens.find("eos_token_id")
    if eos is None:  # said to be none, or never said
        eos = [] if family == "qwen2" or "eos_token_id" in {**hf, **nested} else list(ModelConfig.eos_token_ids)
    with _naming(source):
        vision = _vision(hf, family, keys)
        text = TextConfig(**_text(keys, family, vision is not None), tie_word_embeddings=tied)
        pad = tokens.number("pad_token_id", ModelConfig.pad_token_id)
        return ModelConfig(
            text=text,
            vision=vision,
            family=family,
            **{name: keys.number(name, getattr(ModelConfig, name)) for name in _TOKEN_IDS},
            # Pads never reach the maths; an id outside the table would only break the look-up.
            pad_token_id=pad if pad < text.vocab_size else 0,
            eos_token_ids=tuple(int(e) for e in (eos if isinstance(eos, list | tuple) else [eos])),
            initializer_range=keys.number("initializer_range", ModelConfig.initializer_range, whole=False),
        )


_TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def _text(keys: _Keys, family: str, has_vision: bool) -> dict[str, Any]:
    source = keys.source
    hidden, heads = keys.number("hidden_size"), keys.number("num_attention_heads")
    if heads == 0 or (hidden % heads and keys.find("head_dim") is None):
        raise InfiniteVLError(f"{source}: hidden_size {hidden} over num_attention_heads {heads} is no whole number", "correct one of them")
    head_dim = keys.number("head_dim", hidden // heads)
    theta, section = _rope(keys, family, has_vision, head_dim)

    def read(*names: str, whole: bool = True) -> dict[str, Any]:
        return {name: keys.number(name, getattr(TextConfig, name), whole=whole) for name in names}

    gated_delta = {}
    if family == "infinite_vl":
        gated_delta = read("conv_size", "num_linear_heads", "linear_head_dim") | read("expand_v", "norm_eps", whole=False)
        key_value = keys.number("num_linear_key_value_heads", gated_delta["num_linear_heads"])
        if key_value != gated_delta["num_linear_heads"]:
            raise InfiniteVLError(
                f"{source}: num_linear_key_value_heads {key_value} differs from num_linear_heads {gated_delta['num_linear_heads']}",
                "grouped heads in Gated DeltaNet are not implemented: both have to be equal",
            )
        if (width := gated_delta["expand_v"] * gated_delta["linear_head_dim"]) != int(width):
            raise InfiniteVLError(f"{source}: expand_v x linear_head_dim = {width}", "a value head has a whole width")
    eps = {"infinite_vl": 1e-6, "qwen2_5_vl": 1e-5, "qwen2": 1e-6}[family]
    return {
        "layer_types": _layer_types(keys, family),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.number("num_key_value_heads", heads) or heads,
        "head_dim": head_dim,
        "vocab_size": keys.number("vocab_size"),
        "intermediate_size": keys.number("intermediate_size"),
        **read("sliding_window"),
        "rope_theta": theta,
        "mrope_section": section,
        "rms_norm_eps": keys.number("rms_norm_eps", eps, whole=False),
        **gated_delta,
    }


def _layer_types(keys: _Keys, family: str) -> tuple[str, ...]:
    source, depth = keys.source, keys.number("num_hidden_layers")
    types = keys.find("layer_types")
    if types is not None and not isinstance(types, list | tuple):
        raise InfiniteVLError(f"{source}: layer_types is {types!r}", "give a list with one type for every layer")
    if types is not None and len(types) != depth:
        raise InfiniteVLError(
            f"{source}: layer_types names {len(types)} layers, num_hidden_layers is {depth}", "give one type for every layer"
        )
    if family == "infinite_vl":
        # The authors' training code calls the windowed layers full_attention: only one kind of softmax layer exists.
        return hybrid_pattern(depth) if types is None else tuple(SLIDING if kind == FULL else kind for kind in types)
    window = bool(keys.find("use_sliding_window")) and keys.find("sliding_window") is not None
    if types is None:
        first = keys.number("max_window_layers", 28 if family == "qwen2" else 80) if window else depth
        return tuple(SLIDING if i >= first else FULL for i in range(depth))
    if LINEAR in types:
        raise InfiniteVLError(f"{source}: layer_types has {LINEAR} in a {family} model", "hybrid models have model_type infinite_vl")
    if SLIDING in types and not window:
        raise InfiniteVLError(
            f"{source}: layer_types has {SLIDING}, but use_sliding_window is {keys.find('use_sliding_window')!r}"
            f" and sliding_window {keys.find('sliding_window')!r}",
            "set use_sliding_window to true and sliding_window to the window's length",
        )
    return tuple(types)


def _rope(keys: _Keys, family: str, has_vision: bool, head_dim: int) -> tuple[float, tuple[int, int, int] | None]:
    source, ropes = keys.source, []
    for name in ("rope_scaling", "rope_parameters"):
        rope = keys.find(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise InfiniteVLError(f"{source}: {name} is {rope!r}", "it has to be an object")
        by_kind = [value for value in rope.values() if isinstance(value, Mapping)]  # one object for each kind of layer
        if any(value != by_kind[0] for value in by_kind):
            raise InfiniteVLError(f"{source}: {name} differs between kinds of layers", "one rotary embedding serves all layers here")
        ropes.append(by_kind[0] if by_kind else rope)
        used = _Keys(f"{source}: {name}", ropes[-1])
        accepted = ("default",) if family == "qwen2" else ("default", "mrope")
        used.check({"rope_type": accepted, "type": accepted, "partial_rotary_factor": (1,), "mrope_interleaved": (False,)})
    rope = _Keys(source, *ropes, *keys.scopes)
    theta = rope.number("rope_theta", 1e4 if family == "qwen2" else 1e6, whole=False)
    section = _Keys(source, *ropes).find("mrope_section")
    if family == "qwen2" or (section is None and not has_vision):
        return theta, None
    if section is None:
        section = TextConfig.mrope_section if head_dim == 128 else None
    if not isinstance(section, list | tuple) or len(section) != 3 or not all(isinstance(n, int) for n in section):
        raise InfiniteVLError(f"{source}: mrope_section is {section!r}", "rope_scaling has to give three whole numbers, e.g. [16, 24, 24]")
    return theta, tuple(section)


def _vision(hf: Mapping[str, Any], family: str, text: _Keys) -> VisionConfig | None:
    if family == "qwen2" or (family == "infinite_vl" and "vision_config" in hf and hf["vision_config"] is None):
        return None
    if not hf.get("vision_config"):
        raise InfiniteVLError(
            f"{text.source} has no vision_config",
            "take the config.json that was published with the weights" + (" (null: text only)" if family == "infinite_vl" else ""),
        )
    keys = _Keys(f"{text.source}: vision_config", hf["vision_config"])
    keys.check(_VISION_KEYS)
    rope = keys.find("rope_parameters") or {}
    _Keys(f"{keys.source}.rope_parameters", rope).check({"rope_type": ("axial", "default"), "partial_rotary_factor": (1,)})
    full = keys.find("fullatt_block_indexes")
    if full is not None and not (isinstance(full, list | tuple) and all(isinstance(i, int) for i in full)):
        raise InfiniteVLError(f"{keys.source}: fullatt_block_indexes is {full!r}", "give a list of block numbers")
    sizes = "intermediate_size num_heads in_channels patch_size temporal_patch_size spatial_merge_size window_size"
    return VisionConfig(
        depth=keys.number("depth", VisionConfig.depth),
        hidden_size=keys.number("hidden_size"),
        **{name: keys.number(name, getattr(VisionConfig, name)) for name in sizes.split()},
        fullatt_block_indexes=tuple(VisionConfig.fullatt_block_indexes if full is None else full),
        out_hidden_size=keys.number("out_hidden_size", text.number("hidden_size")),
        tokens_per_second=keys.number("tokens_per_second", 4.0 if family == "qwen2_5_vl" else 2.0, whole=False),
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6, whole=False),
        rope_theta=_Keys(keys.source, rope).number("rope_theta", 1e4, whole=False),
    )


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """config.json (flat, as published) of a model that was born here. `model_config` reads it back to an equal ModelConfig."""
    text, family = config.text, config.family
    if family not in ARCHITECTURES:
        raise InfiniteVLError(f"family {family!r} has no config.json", f"choose one of {', '.join(ARCHITECTURES)}")
    if family == "infinite_vl" and FULL in text.layer_types:
        raise InfiniteVLError(f"layer_types has {FULL}, which infinite_vl cannot say on disk", f"use {SLIDING} and a long sliding_window")
    if family != "infinite_vl" and LINEAR in text.layer_types:
        raise InfiniteVLError(f"layer_types has {LINEAR}, which {family} cannot say on disk", "use the family infinite_vl")
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
        out |= {name: getattr(config, name) for name in _TOKEN_IDS}
        out["vision_config"] = _vision_to_huggingface(config.vision, family)
    return out


def _vision_to_huggingface(vision: VisionConfig, family: str) -> dict[str, Any]:
    names = "depth hidden_size intermediate_size num_heads in_channels patch_size temporal_patch_size spatial_merge_size window_size"
    out = {"model_type": family, "hidden_act": "silu"} | {name: getattr(vision, name) for name in names.split()}
    out |= {"out_hidden_size": vision.out_hidden_size, "fullatt_block_indexes": list(vision.fullatt_block_indexes)}
    rate = vision.tokens_per_second
    out["tokens_per_second"] = int(rate) if rate == int(rate) else rate
    if vision.rms_norm_eps != 1e-6:
        out["rms_norm_eps"] = vision.rms_norm_eps
    if vision.rope_theta != 1e4:
        out["rope_parameters"] = {"rope_type": "axial", "rope_theta": vision.rope_theta}
    return out
