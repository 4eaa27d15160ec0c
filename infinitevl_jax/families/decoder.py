"""Reading and writing of the decoder's keys in Hugging Face's config.json.

Shared by families. The keys and defaults of one family are in its file.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from infinitevl_jax.config.model import FULL, SLIDING, ModelConfig, TextConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.config_file import (
    SILU,
    ConfigFile,
    Deviation,
    Eps,
    Index,
    Keys,
    Layers,
    Size,
    Theta,
    TokenId,
    Vocabulary,
    Window,
    given,
)
from infinitevl_jax.special_tokens import VISION_TOKENS

# our path -> name on disk, of all tensors but the vision tower's
TENSOR_NAMES = ((r"^(layers|embed_tokens|norm)\.", r"model.\1."),)


class DecoderKeys(msgspec.Struct):
    """The decoder. None: the file does not say."""

    hidden_size: Size
    num_attention_heads: Size
    num_hidden_layers: Layers
    vocab_size: Vocabulary
    intermediate_size: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    layer_types: Annotated[list[str], Meta(max_length=128)] | None = None
    sliding_window: Window | None = None
    use_sliding_window: bool = False
    max_window_layers: Index | None = None
    rms_norm_eps: Eps | None = None
    initializer_range: Deviation | None = None


class TieKeys(msgspec.Struct):
    """The head."""

    tie_word_embeddings: bool | None = None


class RopeKeys(msgspec.Struct):
    """rope_scaling, rope_parameters, or the keys themselves at the top."""

    rope_theta: Theta | None = None
    mrope_section: tuple[Index, Index, Index] | None = None


class TokenKeys(msgspec.Struct):
    """Special tokens, of config.json and generation_config.json together."""

    eos_token_id: TokenId | Annotated[list[TokenId], Meta(max_length=1000)] | None = None
    pad_token_id: TokenId | None = None
    image_token_id: TokenId | None = None
    video_token_id: TokenId | None = None
    vision_start_token_id: TokenId | None = None
    vision_end_token_id: TokenId | None = None


# Keys that change the maths -> the values this package computes with (null and absent are always
# fine). What only adds or drops tensors (attention_bias, mlp_bias, ...) needs no line here: the
# weight table finds it.
TEXT_VALUES: dict[str, tuple] = {
    "hidden_act": SILU,
    "hidden_activation": SILU,
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


def read_keys(file: ConfigFile, own: Sequence[str] = ()) -> tuple[Keys, DecoderKeys]:
    """All keys of the decoder, checked against TEXT_VALUES, and those that DecoderKeys declares.

    own: keys of TEXT_VALUES that the family reads itself.
    """
    keys = file.decoder
    keys.check({name: values for name, values in TEXT_VALUES.items() if name not in own})
    return keys, keys.read(DecoderKeys)


def read_sizes(source: str, decoder: DecoderKeys, default_eps: float) -> dict[str, Any]:
    """Widths, heads and window, as arguments of TextConfig."""
    hidden, heads = decoder.hidden_size, decoder.num_attention_heads
    if hidden % heads and decoder.head_dim is None:
        raise InfiniteVLError(
            f"{source}: hidden_size {hidden} over num_attention_heads {heads} is no whole number",
            "correct one of them",
        )
    eps = decoder.rms_norm_eps
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": decoder.num_key_value_heads or heads,
        "head_dim": decoder.head_dim or hidden // heads,
        "vocab_size": decoder.vocab_size,
        "intermediate_size": decoder.intermediate_size,
        "rms_norm_eps": default_eps if eps is None else eps,
        **given(decoder, "sliding_window"),
    }


def read_depth(source: str, decoder: DecoderKeys) -> int:
    """num_hidden_layers. Raises InfiniteVLError where layer_types has another length."""
    types, depth = decoder.layer_types, decoder.num_hidden_layers
    if types is not None and len(types) != depth:
        raise InfiniteVLError(
            f"{source}: layer_types names {len(types)} layers, num_hidden_layers is {depth}",
            "give one type for every layer",
        )
    return depth


def read_softmax_layers(source: str, decoder: DecoderKeys, default_first: int) -> tuple[str, ...]:
    """layer_types of a decoder whose layers are full or sliding-window attention.

    default_first: the first layer with a window, if the file has neither layer_types nor
      max_window_layers.
    """
    types, depth = decoder.layer_types, read_depth(source, decoder)
    window = decoder.use_sliding_window and decoder.sliding_window is not None
    if types is None:
        first = decoder.max_window_layers if window else depth
        first = default_first if first is None else first
        return tuple(SLIDING if i >= first else FULL for i in range(depth))
    if other := sorted(set(types) - {FULL, SLIDING}):
        raise InfiniteVLError(
            f"{source}: layer_types has {', '.join(other)}",
            f"layers of this model_type are {FULL} or {SLIDING}: hybrids have another model_type",
        )
    if SLIDING in types and not window:
        raise InfiniteVLError(
            f"{source}: layer_types has {SLIDING}, but use_sliding_window is"
            f" {decoder.use_sliding_window} and sliding_window {decoder.sliding_window}",
            "set use_sliding_window to true and sliding_window to the window's length",
        )
    return tuple(types)


def read_rope(
    keys: Keys, default_theta: float, types: tuple[str, ...] = ("default", "mrope")
) -> RopeKeys:
    """Base of the rotary frequencies, and the sections of M-RoPE if the file has them.

    types: the values of rope_type that the family accepts.
    """
    ropes = []
    for name in ("rope_scaling", "rope_parameters"):
        if (rope := keys.section(name)) is None:
            continue
        kinds = [value for value in rope.values() if isinstance(value, Mapping)]
        if any(value != kinds[0] for value in kinds):
            raise InfiniteVLError(
                f"{keys.source}: {name} differs between kinds of layers",
                "one rotary embedding serves all layers here",
            )
        ropes.append(kinds[0] if kinds else rope)
        Keys(f"{keys.source}: {name}", ropes[-1]).check(
            {
                "rope_type": types,
                "type": types,
                "partial_rotary_factor": (1,),
                "mrope_interleaved": (False,),
            }
        )
    theta = Keys(keys.source, *ropes, *keys.scopes).read(RopeKeys).rope_theta
    section = Keys(f"{keys.source}: rope_scaling", *ropes).read(RopeKeys).mrope_section
    return RopeKeys(theta or default_theta, section)


def read_mrope(keys: Keys, head_dim: int, *, required: bool) -> dict[str, Any]:
    """Rotary embedding of a vision-language model, as arguments of TextConfig.

    required: whether M-RoPE sections are needed. A head width of 128 has a default.
    """
    rope = read_rope(keys, default_theta=1e6)
    section = rope.mrope_section
    if section is None and required and head_dim == 128:
        section = TextConfig.mrope_section
    if section is None and required:
        raise InfiniteVLError(
            f"{keys.source}: mrope_section is None",
            "rope_scaling has to give three whole numbers, e.g. [16, 24, 24]",
        )
    return {"rope_theta": rope.rope_theta, "mrope_section": section}


def read_tied(file: ConfigFile, default: bool) -> bool:
    """Whether the output head is the token table."""
    # Files written before transformers 5 say it in text_config, later ones at the root.
    inner, outer = (
        Keys(file.source, scope).read(TieKeys).tie_word_embeddings
        for scope in (file.nested, file.content)
    )
    return bool(inner or (default if outer is None else outer))


def read_tokens(
    file: ConfigFile, vocab_size: int, default_eos: tuple[int, ...] = ModelConfig.eos_token_ids
) -> dict[str, Any]:
    """Special tokens, as arguments of ModelConfig. generation_config.json has precedence.

    default_eos: used if neither file has the key. Null means that there is no end token.
    """
    scopes = file.generation or {}, file.nested, file.content
    tokens = Keys(f"{file.source} / generation_config.json", *scopes).read(TokenKeys)
    eos, pad = tokens.eos_token_id, tokens.pad_token_id
    if eos is None:
        eos = [] if "eos_token_id" in {**file.content, **file.nested} else list(default_eos)
    pad = ModelConfig.pad_token_id if pad is None else pad
    return {
        **given(tokens, *VISION_TOKENS),
        # Pads never reach the maths; an id outside the table would only break the look-up.
        "pad_token_id": pad if 0 <= pad < vocab_size else 0,
        "eos_token_ids": tuple(eos if isinstance(eos, list) else [eos]),
    }


def write_decoder(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """config.json (flat, as published) of a text model."""
    text, eos = config.text, list(config.eos_token_ids)
    out: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": config.family,
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
        "use_sliding_window": SLIDING in text.layer_types,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": text.vocab_size,
    }
    if text.head_dim != text.hidden_size // text.num_attention_heads:
        out["head_dim"] = text.head_dim
    if text.mrope_section is not None:
        out["rope_scaling"] = {"type": "mrope", "mrope_section": list(text.mrope_section)}
    return out


def refuse_options(config: ModelConfig, own: Sequence[str] = ()) -> None:
    """Raise InfiniteVLError if the decoder uses an option that the family has no key for.

    own: options that the family has keys for.
    """
    text = config.text
    options = {
        "partial_rotary_factor": (text.partial_rotary_factor, 1),
        "num_attention_sinks": (text.num_attention_sinks, 0),
        "query_key_norm": (text.query_key_norm, False),
        "attention_output_gate": (text.attention_output_gate, False),
        "num_linear_key_heads": (text.linear_key_heads, text.num_linear_heads),
    }
    for name, (value, plain) in options.items():
        if value != plain and name not in own:
            raise InfiniteVLError(
                f"{name} is {value}, which {config.family} cannot say on disk",
                f"make it {plain}, or use a family that has it",
            )


def refuse_layer_types(config: ModelConfig, refused: set[str], cure: str) -> None:
    """Raise InfiniteVLError if the decoder has layers of these types."""
    if found := sorted(refused & set(config.text.layer_types)):
        raise InfiniteVLError(
            f"layer_types has {', '.join(found)}, which {config.family} cannot say on disk", cure
        )
