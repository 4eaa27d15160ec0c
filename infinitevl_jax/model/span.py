"""What a layer is told about the tokens of one call. Order is not position: vision tokens share rotary positions, so masks, cache
slots and resets go by the ordinal `index`, and positions only reach the rotary angles."""

from typing import NamedTuple

from jax import Array


class Span(NamedTuple):
    """Tokens of one decoder call, computed once and shared by all layers."""

    index: Array  # [batch, length] int32 ordinal of the token in its sequence; -1 = pad, which leaves every state as it is
    segment: Array  # [batch, length] int32 which packed sequence the token belongs to
    length: Array  # [batch] int32 tokens already in the cache
    cos: Array  # [batch, length, head_dim / 2] f32
    sin: Array


class VisionSpan(NamedTuple):
    """Patches of one vision tower call, in window order."""

    index: Array  # [rows, patches] int32; -1 = pad
    window: Array  # [rows, patches] int32 attention window of the patch
    slice: Array  # [rows, patches] int32 temporal slice of its image or video
    cos: Array  # [rows, patches, head_dim / 2] f32
    sin: Array
    slice_reach: int  # the longest slice has no more patches than this (static)
