"""The keys of Hugging Face's config.json that this package reads: their types and ranges, and the
values of those it only checks.

Sizes have upper limits far above every published model, so that a damaged file is refused before
anything is built.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

Layers = Annotated[int, Meta(ge=1, le=128)]  # the deepest published decoders have 126
Size = Annotated[int, Meta(ge=1, le=1 << 20)]
Index = Annotated[int, Meta(ge=0, le=1 << 20)]
Window = Annotated[int, Meta(ge=0, le=1 << 30)]  # tokens; 0 where no layer has one
TokenId = Annotated[int, Meta(ge=-1, le=2**31 - 1)]  # -1 is how some writers say "none"
Eps = Annotated[float, Meta(ge=0, lt=1)]
Theta = Annotated[float, Meta(ge=1, le=1e18)]
Rate = Annotated[float, Meta(gt=0, le=1e6)]


class TextKeys(msgspec.Struct):
    """The decoder. None: the file does not say."""

    hidden_size: Size
    num_attention_heads: Size
    num_hidden_layers: Layers
    vocab_size: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    intermediate_size: Size
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    layer_types: Annotated[list[str], Meta(max_length=128)] | None = None
    sliding_window: Window | None = None
    use_sliding_window: bool = False
    max_window_layers: Index | None = None
    rms_norm_eps: Eps | None = None
    initializer_range: Annotated[float, Meta(ge=0, le=10)] | None = None
    # Gated DeltaNet
    conv_size: Size | None = None
    num_linear_heads: Size | None = None
    num_linear_key_value_heads: Size | None = None
    linear_head_dim: Size | None = None
    expand_v: Annotated[float, Meta(gt=0, le=64)] | None = None
    norm_eps: Eps | None = None


class TieKeys(msgspec.Struct):
    """The head."""

    tie_word_embeddings: bool | None = None


class RopeKeys(msgspec.Struct):
    """rope_scaling, rope_parameters, or the keys themselves at the top."""

    rope_theta: Theta | None = None
    mrope_section: tuple[Index, Index, Index] | None = None


class VisionKeys(msgspec.Struct):
    """vision_config."""

    hidden_size: Size
    depth: Layers | None = None
    intermediate_size: Size | None = None
    num_heads: Size | None = None
    in_channels: Size | None = None
    patch_size: Size | None = None
    temporal_patch_size: Size | None = None
    spatial_merge_size: Size | None = None
    window_size: Size | None = None
    fullatt_block_indexes: Annotated[list[Index], Meta(max_length=128)] | None = None
    out_hidden_size: Size | None = None
    tokens_per_second: Rate | None = None
    rms_norm_eps: Eps | None = None


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
_SILU = ("silu", "swish")
TEXT_VALUES: dict[str, tuple] = {
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
VISION_VALUES: dict[str, tuple] = {
    "hidden_act": _SILU,
    "quantization_config": (),
    "qkv_bias": (True,),
    "deepstack_visual_indexes": ([],),
}
