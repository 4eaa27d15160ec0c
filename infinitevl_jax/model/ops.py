"""The three operations that have kernels, as one record handed to the mixers at construction.

Layers never choose a kernel: whoever builds the model resolves the record once, from the run's configuration and the mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pallas_kernels


@dataclass(frozen=True)
class Ops:
    """attend, gated_delta_rule and causal_conv with the signatures of `pallas_kernels`."""

    attend: Callable = pallas_kernels.attend
    gated_delta_rule: Callable = pallas_kernels.gated_delta_rule
    causal_conv: Callable = pallas_kernels.causal_conv
