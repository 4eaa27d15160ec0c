"""InfiniteVL and its LongSFT sibling: sliding-window attention and Gated DeltaNet, with the
Qwen2.5-VL vision tower or none."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from infinitevl_jax.config.model import FULL, SLIDING, ModelConfig, TextConfig, hybrid_pattern
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families import decoder, vision
from infinitevl_jax.families.config_file import ConfigFile, Eps, Index, Size, given
from infinitevl_jax.families.family import Family, TransformersCode, register_family

_ARCHITECTURE = "InfiniteVLQwen2_5_VLForConditionalGeneration"
_CLASS = f"modeling_infinitevl.{_ARCHITECTURE}"


class HybridKeys(msgspec.Struct):
    """Gated DeltaNet and the window's sinks. None: the file does not say."""

    conv_size: Size | None = None
    num_linear_heads: Size | None = None
    num_linear_key_value_heads: Size | None = None
    linear_head_dim: Size | None = None
    expand_v: Annotated[float, Meta(gt=0, le=64)] | None = None
    norm_eps: Eps | None = None
    num_attention_sinks: Index | None = None


_GATED_DELTA = "conv_size", "expand_v", "num_linear_heads", "linear_head_dim", "norm_eps"
_SINKS = ("num_attention_sinks",)


def read(file: ConfigFile) -> ModelConfig:
    """The published files name no layer_types and no size of the Gated DeltaNet."""
    keys, text = decoder.read_keys(file, own=_SINKS)
    tower = None
    if "vision_config" not in file.content or file.content["vision_config"] is not None:
        tower = vision.read_vision(file, text.hidden_size, 2.0, " (null: text only)")
    sizes = decoder.read_sizes(file.source, text, default_eps=1e-6)
    hybrid = keys.read(HybridKeys)
    heads = hybrid.num_linear_heads or TextConfig.num_linear_heads
    if hybrid.num_linear_key_value_heads not in (None, heads):
        raise InfiniteVLError(
            f"{file.source}: num_linear_key_value_heads"
            f" {hybrid.num_linear_key_value_heads} differs from num_linear_heads {heads}",
            "the published model has no grouped heads in Gated DeltaNet: both have to be equal",
        )
    return ModelConfig(
        text=TextConfig(
            layer_types=_layer_types(file.source, text),
            **sizes,
            **decoder.read_mrope(keys, sizes["head_dim"], required=tower is not None),
            **given(hybrid, *_GATED_DELTA, *_SINKS),
            tie_word_embeddings=decoder.read_tied(file, default=True),
        ),
        vision=tower,
        family=FAMILY.name,
        **decoder.read_tokens(file, text.vocab_size),
        **given(text, "initializer_range"),
    )


def _layer_types(source: str, text: decoder.DecoderKeys) -> tuple[str, ...]:
    depth = decoder.read_depth(source, text)
    if text.layer_types is None:
        return hybrid_pattern(depth)
    # The authors' training code calls the windowed layers full_attention: only one kind of softmax
    # layer exists.
    return tuple(SLIDING if kind == FULL else kind for kind in text.layer_types)


def write(config: ModelConfig) -> dict[str, Any]:
    """Layers of any registered type but full attention, which the published code would read as
    sliding-window attention."""
    decoder.refuse_layer_types(config, {FULL}, f"use {SLIDING} and a long sliding_window")
    decoder.refuse_options(config, own=_SINKS)
    out = decoder.write_decoder(config, _ARCHITECTURE)
    out |= {name: getattr(config.text, name) for name in _GATED_DELTA}
    if config.text.num_attention_sinks:  # the published code does not know the key
        out |= {name: getattr(config.text, name) for name in _SINKS}
    out |= {"num_linear_key_value_heads": config.text.num_linear_heads, "vision_config": None}
    return out if config.vision is None else out | vision.write_vision(config)


FAMILY = Family(
    "infinite_vl",
    read,
    write,
    tensor_names=vision.TENSOR_NAMES + decoder.TENSOR_NAMES,
    # its files come without a head, however they are configured
    missing_head_is_tied=True,
    transformers_code=TransformersCode(
        "infinitevl_jax.checkpoints.transformers_code",
        {
            "AutoConfig": "configuration_infinitevl.InfiniteVLConfig",
            "AutoModel": _CLASS,
            "AutoModelForCausalLM": _CLASS,
            "AutoModelForImageTextToText": _CLASS,
        },
    ),
)
register_family(FAMILY)
