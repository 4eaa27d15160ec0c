"""Softmax attention by token order: windows, sinks, packed sequences, cached keys."""

from pallas_kernels.attention.api import RESIDUAL_NAMES, attention, attention_step
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.merge import merge
from pallas_kernels.attention.state import KVCache, held_tokens, write

__all__ = [
    "RESIDUAL_NAMES", "KVCache", "Mask", "attention", "attention_step", "held_tokens", "merge",
    "write",
]  # fmt: skip
