"""What a layer is told about the tokens of one call. Order is not position: vision tokens share
rotary positions, so masks, cache slots and resets go by the ordinal `index`, and positions only
reach the rotary angles."""

from typing import NamedTuple

from jax import Array, lax


class Span(NamedTuple):
    """Tokens of one decoder call, computed once and shared by all layers."""

    # [batch, length] int32 ordinal of the token in its sequence; -1 = pad, which leaves every state
    # as it is
    index: Array
    segment: Array  # [batch, length] int32 which packed sequence the token belongs to
    length: Array  # [batch] int32 tokens already in the cache
    cos: Array  # [batch, length, head_dim / 2] f32
    sin: Array


def inside_layer(span: Span, x: Array) -> Span:
    """The same span, as something that a layer's input x decides.

    Differentiated, a scan over layers moves out of itself all that depends on the span alone:
    dozens of masks as long and wide as activations, held in memory (1 GB at the published size and
    8,192 tokens) and read by every layer, which would compute them on its way.
    """
    return lax.optimization_barrier((span, lax.stop_gradient(x)))[0]


class VisionSpan(NamedTuple):
    """Patches of one vision tower call, in window order."""

    index: Array  # [rows, patches] int32; -1 = pad
    window: Array  # [rows, patches] int32 attention window of the patch
    slice: Array  # [rows, patches] int32 temporal slice of its image or video
    cos: Array  # [rows, patches, head_dim / 2] f32
    sin: Array
    slice_reach: int  # the longest slice has no more patches than this (static)
