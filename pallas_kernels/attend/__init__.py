"""Softmax attention over tokens known by their ordinal: windows, sinks, packed sequences, cached keys."""

from pallas_kernels.attend.mask import Mask
from pallas_kernels.attend.merge import merge
from pallas_kernels.attend.xla import attend

__all__ = ["Mask", "attend", "merge"]
