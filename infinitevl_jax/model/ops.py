"""The three operations that have kernels, as one record handed to the mixers at construction.

Layers never choose a kernel: whoever builds the model resolves the record once, from the run's configuration and the mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pallas_kernels.attend import attend
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.gated_delta_rule import gated_delta_rule


@dataclass(frozen=True)
class Ops:
    """attend, gated_delta_rule and causal_conv with the signatures of `pallas_kernels`; the portable ones by default."""

    attend: Callable = attend
    gated_delta_rule: Callable = gated_delta_rule
    causal_conv: Callable = causal_conv
