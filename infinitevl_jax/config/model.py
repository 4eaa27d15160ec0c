"""Model configuration: decoder, vision tower, whole model.

InfiniteVL (sliding-window attention and Gated DeltaNet), Qwen2.5-VL (full attention, M-RoPE) and
Qwen2 (full attention, plain RoPE) share one decoder and differ in its configuration.
`infinitevl_jax.families` reads it from config.json.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from infinitevl_jax import special_tokens
from infinitevl_jax.config.ranges import (
    INT32,
    LAYERS,
    Base,
    Count,
    Heads,
    Share,
    Width,
    check_ranges,
)
from infinitevl_jax.errors import InfiniteVLError

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
LAYER_TYPES = {SLIDING, FULL, LINEAR}  # `infinitevl_jax.nn.mixers.register_mixer` adds to it


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen2.5-VL vision tower. Sizes named `*_size` are in pixels or channels.

    The configuration of another tower is a subclass: inputs are laid out by its patches.
    """

    depth: Annotated[int, Meta(ge=1, le=LAYERS)] = 32
    hidden_size: Width = 1280
    intermediate_size: Width = 3420
    num_heads: Heads = 16
    in_channels: Annotated[int, Meta(ge=1, le=64)] = 3
    patch_size: Annotated[int, Meta(ge=1, le=512)] = 14
    temporal_patch_size: Annotated[int, Meta(ge=1, le=64)] = 2
    spatial_merge_size: Annotated[int, Meta(ge=1, le=64)] = 2
    window_size: Annotated[int, Meta(ge=1, le=65536)] = 112
    fullatt_block_indexes: tuple[Count, ...] = (7, 15, 23, 31)
    out_hidden_size: Width = 2048
    tokens_per_second: Annotated[float, Meta(ge=0, le=1e6)] = 2.0
    rms_norm_eps: Share = 1e-6
    rope_theta: Base = 10000.0

    def __post_init__(self):
        object.__setattr__(self, "fullatt_block_indexes", tuple(self.fullatt_block_indexes))
        check_ranges(self)
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise InfiniteVLError(
                f"vision_config: hidden_size {self.hidden_size} over num_heads {self.num_heads} is"
                " not a multiple of 4",
                "2-D rotary embedding needs head_dim divisible by 4; change hidden_size or"
                " num_heads",
            )
        if self.window_size % (self.patch_size * self.spatial_merge_size):
            raise InfiniteVLError(
                f"vision_config: window_size {self.window_size} is not a multiple of "
                f"patch_size x spatial_merge_size = {self.patch_size * self.spatial_merge_size}",
                "choose a window that holds whole merged tokens",
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_features(self) -> int:
        """Values per patch: channels x temporal_patch_size x patch_size^2."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches per token."""
        return self.spatial_merge_size**2

    @property
    def window_tokens(self) -> int:
        """Side of an attention window in merged tokens."""
        return self.window_size // (self.patch_size * self.spatial_merge_size)


@dataclass(frozen=True)
class TextConfig:
    """The decoder. `layer_types` names the type of every layer, out of LAYER_TYPES."""

    layer_types: Annotated[tuple[str, ...], Meta(max_length=LAYERS)]
    vocab_size: Annotated[int, Meta(ge=1, le=2**24)] = 151936
    hidden_size: Width = 2048
    intermediate_size: Width = 11008
    num_attention_heads: Heads = 16
    num_key_value_heads: Heads = 2
    head_dim: Width = 128
    sliding_window: Annotated[int, Meta(ge=0, le=INT32)] = 8192
    num_attention_sinks: Count = 0  # first tokens that sliding-window layers always see
    rope_theta: Base = 1e6
    mrope_section: tuple[Count, Count, Count] | None = (16, 24, 24)
    rms_norm_eps: Share = 1e-6
    tie_word_embeddings: bool = True
    partial_rotary_factor: Annotated[float, Meta(gt=0, le=1)] = 1.0  # share of head_dim
    query_key_norm: bool = False  # RMSNorm of each query and key head
    attention_output_gate: bool = False
    # Gated DeltaNet
    conv_size: Count = 4
    expand_v: Annotated[float, Meta(gt=0, le=64)] = 2.0
    num_linear_heads: Heads = 16  # value heads
    num_linear_key_heads: Heads | None = None  # None: same as value heads
    linear_head_dim: Width = 128
    norm_eps: Share = 1e-5

    def __post_init__(self):
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        if self.mrope_section is not None:
            object.__setattr__(self, "mrope_section", tuple(self.mrope_section))
        check_ranges(self)
        if self.mrope_section is not None and sum(self.mrope_section) != self.rotary_dim // 2:
            raise InfiniteVLError(
                f"mrope_section {list(self.mrope_section)} sums to {sum(self.mrope_section)}, not"
                f" half of the {self.rotary_dim} rotary channels of a head",
                "make the sections (temporal, height, width) add up to half of head_dim x"
                " partial_rotary_factor",
            )
        if self.num_linear_heads % self.linear_key_heads:
            raise InfiniteVLError(
                f"num_linear_heads {self.num_linear_heads} is not a multiple of"
                f" num_linear_key_heads {self.linear_key_heads}",
                "each key head of Gated DeltaNet serves a whole number of value heads",
            )
        unknown = sorted(set(self.layer_types) - LAYER_TYPES)
        if unknown or not self.layer_types:
            raise InfiniteVLError(
                f"layer_types holds {unknown or 'nothing'}",
                f"every layer is one of {', '.join(sorted(LAYER_TYPES))}",
            )
        if self.conv_size != 4:
            raise InfiniteVLError(
                f"conv_size is {self.conv_size}",
                "the convolutions have 4 taps: leave conv_size at 4",
            )
        if self.head_dim % 2 or self.linear_head_dim * self.expand_v != self.linear_value_dim:
            raise InfiniteVLError(
                f"head_dim {self.head_dim}, linear_head_dim {self.linear_head_dim} x expand_v"
                f" {self.expand_v}",
                "make head_dim even, and expand_v x linear_head_dim a whole number",
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InfiniteVLError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}",
                "each key/value head serves a whole number of query heads",
            )
        if SLIDING in self.layer_types and self.sliding_window < 1:
            raise InfiniteVLError(
                f"sliding_window is {self.sliding_window}",
                "a window holds at least the token itself: 1 or more",
            )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def rotary_dim(self) -> int:
        """Channels of an attention head with rotary embedding."""
        return 2 * int(self.head_dim * self.partial_rotary_factor / 2)

    @property
    def linear_key_heads(self) -> int:
        """Query and key heads of Gated DeltaNet."""
        return self.num_linear_key_heads or self.num_linear_heads

    @property
    def linear_value_dim(self) -> int:
        """Value width of a Gated DeltaNet head."""
        return int(self.linear_head_dim * self.expand_v)


@dataclass(frozen=True)
class ModelConfig:
    """A whole model: decoder, vision tower (None for text models), special token ids."""

    text: TextConfig
    vision: VisionConfig | None = dataclasses.field(default_factory=VisionConfig)
    family: str = "infinite_vl"  # model_type in config.json, of a registered family
    image_token_id: Count = special_tokens.IDS[special_tokens.IMAGE]
    video_token_id: Count = special_tokens.IDS[special_tokens.VIDEO]
    vision_start_token_id: Count = special_tokens.IDS[special_tokens.VISION_START]
    vision_end_token_id: Count = special_tokens.IDS[special_tokens.VISION_END]
    pad_token_id: Count = special_tokens.IDS[special_tokens.END_OF_TEXT]
    eos_token_ids: tuple[Count, ...] = special_tokens.EOS_IDS
    initializer_range: Annotated[float, Meta(ge=0, le=1e6)] = 0.02

    def __post_init__(self):
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        check_ranges(self)
        if self.vision is not None and self.vision.out_hidden_size != self.text.hidden_size:
            raise InfiniteVLError(
                f"vision out_hidden_size {self.vision.out_hidden_size} differs from the decoder's"
                f" hidden_size {self.text.hidden_size}",
                "make them equal",
            )


def hybrid_pattern(num_layers: int, period: int = 4) -> tuple[str, ...]:
    """InfiniteVL's pattern: every `period`-th layer, from 0, is sliding-window, the rest linear."""
    return tuple(SLIDING if i % period == 0 else LINEAR for i in range(num_layers))


def infinitevl_4b() -> ModelConfig:
    """The released InfiniteVL: 36 layers, 4,408,381,536 parameters."""
    return ModelConfig(text=TextConfig(layer_types=hybrid_pattern(36)))


def qwen2_5_vl_3b() -> ModelConfig:
    """Qwen2.5-VL-3B, of which InfiniteVL was made: full attention in 36 layers of its sizes."""
    return ModelConfig(text=TextConfig(layer_types=(FULL,) * 36), family="qwen2_5_vl")
