"""Qwen2.5-VL: full attention with M-RoPE, a window in the upper layers where configured, and its
vision tower."""

from typing import Any

from infinitevl_jax.config.model import FULL, LAYER_TYPES, SLIDING, ModelConfig, TextConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families import decoder, vision
from infinitevl_jax.families.config_file import ConfigFile, given
from infinitevl_jax.families.family import Family, register_family


def read(file: ConfigFile) -> ModelConfig:
    """Defaults are those of transformers' Qwen2_5_VLConfig."""
    keys, text = decoder.read_keys(file)
    tower = vision.read_vision(file, text.hidden_size, 4.0)
    sizes = decoder.read_sizes(file.source, text, default_eps=1e-5)
    return ModelConfig(
        text=TextConfig(
            layer_types=decoder.read_softmax_layers(file.source, text, default_first=80),
            **sizes,
            **decoder.read_mrope(keys, sizes["head_dim"], required=True),
            tie_word_embeddings=decoder.read_tied(file, default=False),
        ),
        vision=tower,
        family=FAMILY.name,
        **decoder.read_tokens(file, text.vocab_size),
        **given(text, "initializer_range"),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """Softmax layers alone, with a tower."""
    other = LAYER_TYPES - {FULL, SLIDING}
    decoder.refuse_layer_types(config, other, "use the family infinite_vl")
    decoder.refuse_options(config)
    if config.vision is None or config.text.mrope_section is None:
        raise InfiniteVLError(
            f"vision is {config.vision} and mrope_section {config.text.mrope_section} in a"
            f" {config.family} model",
            f"{config.family} has both",
        )
    out = decoder.write_decoder(config, "Qwen2_5_VLForConditionalGeneration")
    return out | vision.write_vision(config)


FAMILY = Family("qwen2_5_vl", read, write, vision.TENSOR_NAMES + decoder.TENSOR_NAMES)
register_family(FAMILY)
