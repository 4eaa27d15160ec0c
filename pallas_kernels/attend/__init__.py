"""Softmax attention over tokens known by their ordinal: windows, sinks, packed sequences, cached keys."""

from pallas_kernels.attend.check import check
from pallas_kernels.attend.mask import Mask
from pallas_kernels.attend.merge import merge
from pallas_kernels.attend.xla import attend

# names, in every implementation, of what the backward pass keeps besides the inputs: for policies of rematerialisation
KEPT = ("attend_out", "attend_lse")

__all__ = ["KEPT", "Mask", "attend", "check", "merge"]
