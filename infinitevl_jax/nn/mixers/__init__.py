"""Token mixers of the decoder by layer type."""

from infinitevl_jax.nn.mixers import gated_delta_net, softmax_attention
from infinitevl_jax.nn.mixers.mixer import Mixer
from infinitevl_jax.nn.mixers.registry import LayerType, layer_type, register_mixer

__all__ = [
    "LayerType",
    "Mixer",
    "gated_delta_net",
    "layer_type",
    "register_mixer",
    "softmax_attention",
]
