"""Token metadata passed to every layer.

Masks, cache slots and resets use `token_index`, because vision tokens share rotary positions.
Positions are used for the rotary angles only.
"""

from typing import NamedTuple

from jax import Array, lax


class TokenInfo(NamedTuple):
    """Tokens of one decoder call, computed once for all layers.

    Attributes:
      token_index: [batch, length] int32, index of the token in its sequence; -1 is padding, which
        changes no state.
      segment_ids: [batch, length] int32, packed sequence of the token.
      length: [batch] int32, tokens already in the cache.
      cos, sin: [batch, length, head_dim / 2] float32.
      fresh: whether the program knows that `length` is 0: nothing cached is to be looked at.
    """

    token_index: Array
    segment_ids: Array
    length: Array
    cos: Array
    sin: Array
    fresh: bool = False


def inside_layer(info: TokenInfo, x: Array) -> TokenInfo:
    """Make `info` depend on a layer's input x.

    Otherwise the derivative of a scan over layers hoists everything that depends on `info` alone:
    dozens of masks the size of activations (1 GB for the 4B model at 8,192 tokens).
    """
    arrays = info[:-1]
    return TokenInfo(*lax.optimization_barrier((arrays, lax.stop_gradient(x)))[0], info.fresh)


class PatchInfo(NamedTuple):
    """Patches of one vision tower call, in window order.

    Attributes:
      patch_index: [rows, patches] int32; -1 is padding.
      window_ids: [rows, patches] int32, attention window of the patch.
      slice_ids: [rows, patches] int32, temporal slice of its image or video.
      cos, sin: [rows, patches, head_dim / 2] float32.
      slice_reach: upper bound on the patches of a slice (static).
    """

    patch_index: Array
    window_ids: Array
    slice_ids: Array
    cos: Array
    sin: Array
    slice_reach: int
