"""What a layer is told about the tokens of one call.

Order is not position: vision tokens share rotary positions. Masks, cache slots and resets therefore
go by `token_index`; positions only reach the rotary angles.
"""

from typing import NamedTuple

from jax import Array, lax


class TokenInfo(NamedTuple):
    """Tokens of one decoder call, computed once and shared by all layers."""

    # [batch, length] int32 ordinal of the token in its sequence; -1 = pad, which leaves every state
    # as it is
    token_index: Array
    segment_ids: Array  # [batch, length] int32 which packed sequence the token belongs to
    length: Array  # [batch] int32 tokens already in the cache
    cos: Array  # [batch, length, head_dim / 2] f32
    sin: Array


def inside_layer(info: TokenInfo, x: Array) -> TokenInfo:
    """The same, as something that a layer's input x decides.

    Differentiated, a scan over layers moves out of itself all that depends on `info` alone:
    dozens of masks as long and wide as activations, held in memory (1 GB at the published size and
    8,192 tokens) and read by every layer, which would compute them on its way.
    """
    return lax.optimization_barrier((info, lax.stop_gradient(x)))[0]


class PatchInfo(NamedTuple):
    """Patches of one vision tower call, in window order."""

    patch_index: Array  # [rows, patches] int32; -1 = pad
    window_ids: Array  # [rows, patches] int32 attention window of the patch
    slice_ids: Array  # [rows, patches] int32 temporal slice of its image or video
    cos: Array  # [rows, patches, head_dim / 2] f32
    sin: Array
    slice_reach: int  # the longest slice has no more patches than this (static)
