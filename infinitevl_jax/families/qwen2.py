"""Qwen2 and Qwen2.5 text models: full attention with plain RoPE, and a window in the upper layers
where configured."""

from typing import Any

from infinitevl_jax.config.model import FULL, LAYER_TYPES, SLIDING, ModelConfig, TextConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families import decoder
from infinitevl_jax.families.config_file import ConfigFile, given
from infinitevl_jax.families.family import Family, register_family


def read(file: ConfigFile) -> ModelConfig:
    """Defaults are those of transformers' Qwen2Config."""
    keys, text = decoder.read_keys(file)
    rope = decoder.read_rope(keys, default_theta=1e4, types=("default",))
    return ModelConfig(
        text=TextConfig(
            layer_types=decoder.read_softmax_layers(file.source, text, default_first=28),
            **decoder.read_sizes(file.source, text, default_eps=1e-6),
            rope_theta=rope.rope_theta,
            mrope_section=None,
            tie_word_embeddings=decoder.read_tied(file, default=False),
        ),
        vision=None,
        family=FAMILY.name,
        **decoder.read_tokens(file, text.vocab_size, default_eos=()),
        **given(text, "initializer_range"),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    """Softmax layers alone, without a tower."""
    other = LAYER_TYPES - {FULL, SLIDING}
    decoder.refuse_layer_types(config, other, "use the family infinite_vl")
    decoder.refuse_options(config)
    if config.vision is not None or config.text.mrope_section is not None:
        raise InfiniteVLError(
            f"vision is {config.vision} and mrope_section {config.text.mrope_section} in a"
            f" {config.family} model",
            f"{config.family} has neither",
        )
    return decoder.write_decoder(config, "Qwen2ForCausalLM")


FAMILY = Family("qwen2", read, write, decoder.TENSOR_NAMES)
register_family(FAMILY)
