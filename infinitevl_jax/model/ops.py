"""The three operations that have kernels, as one record handed to the mixers at construction.

Layers never choose a kernel: whoever builds the model resolves the record once, from the run's configuration and the mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
from jax.sharding import Mesh

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.sharding.kernels import shard_attend, shard_gated_delta_rule
from pallas_kernels.attend import attend
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.dispatch import Dispatch
from pallas_kernels.gated_delta_rule import gated_delta_rule


@dataclass(frozen=True)
class Ops:
    """attend, gated_delta_rule and causal_conv with the signatures of `pallas_kernels`; the portable ones by default."""

    attend: Callable = attend
    gated_delta_rule: Callable = gated_delta_rule
    causal_conv: Callable = causal_conv
    dispatches: tuple[Dispatch, ...] = ()

    def report(self) -> list[str]:
        """What ran so far, a line for each operator and case, with why nothing preferred to it did."""
        return [line for dispatch in self.dispatches for line in dispatch.report()]


@cache
def resolve_ops(mesh: Mesh | None = None, attend_by: str | None = None, gated_delta_rule_by: str | None = None) -> Ops:
    """The operators for the devices of a mesh (None: this process's first device).

    attend_by, gated_delta_rule_by: names of implementations, which then run or fail; None takes the first that can.
    Raises InfiniteVLError for an unknown name.
    """
    # here, for only whoever runs a model needs the kernels' compilers
    from pallas_kernels.attend.implementations import IMPLEMENTATIONS as ATTEND
    from pallas_kernels.gated_delta_rule.implementations import IMPLEMENTATIONS as GATED_DELTA_RULE

    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    try:
        chosen = (
            Dispatch("attend", ATTEND, device, attend_by),
            Dispatch("gated_delta_rule", GATED_DELTA_RULE, device, gated_delta_rule_by),
        )
    except ValueError as error:
        raise InfiniteVLError(*str(error).split("\n  -> ")) from None
    if mesh is None:
        return Ops(*chosen, dispatches=chosen)
    return Ops(shard_attend(chosen[0], mesh), shard_gated_delta_rule(chosen[1], mesh), dispatches=chosen)
