"""The operations that differ by device, as one record handed to the mixers at construction.

Layers never choose a kernel: whoever builds the model resolves the record once, from the run's configuration and the mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import jax
from jax.sharding import Mesh

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.sharding.kernels import shard_attend, shard_causal_conv, shard_gated_delta_rule, shard_unit_heads
from pallas_kernels.attend import attend
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.dispatch import Dispatch, Refusal
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.unit_heads import unit_heads, unit_heads_for


@dataclass(frozen=True)
class Ops:
    """attend, gated_delta_rule, causal_conv and unit_heads with the signatures of `pallas_kernels`; the portable ones by default."""

    attend: Callable = attend
    gated_delta_rule: Callable = gated_delta_rule
    causal_conv: Callable = causal_conv
    unit_heads: Callable = unit_heads
    dispatches: tuple[Dispatch, ...] = ()

    def report(self) -> list[str]:
        """What ran so far in this process, a line for each operator and case, with why nothing preferred to it did."""
        return [line for dispatch in self.dispatches for line in dispatch.report()]


@cache
def resolve_ops(
    mesh: Mesh | None = None, attend_by: str | None = None, gated_delta_rule_by: str | None = None, causal_conv_by: str | None = None
) -> Ops:
    """The operators for the devices of a mesh (None: this process's first device).

    attend_by and so on: an implementation, or several in order ("mosaic_gpu,xla"), which then run or fail; None allows all.
    Raises InfiniteVLError for an unknown name, or one that is not for these devices; the operators do for a case that none takes.
    """
    # here, for only whoever runs a model needs the kernels' compilers
    from pallas_kernels.attend.implementations import IMPLEMENTATIONS as ATTEND
    from pallas_kernels.causal_conv.implementations import IMPLEMENTATIONS as CAUSAL_CONV
    from pallas_kernels.gated_delta_rule.implementations import IMPLEMENTATIONS as GATED_DELTA_RULE

    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    try:
        chosen = (
            Dispatch("attend", ATTEND, device, attend_by),
            Dispatch("gated_delta_rule", GATED_DELTA_RULE, device, gated_delta_rule_by),
            Dispatch("causal_conv", CAUSAL_CONV, device, causal_conv_by),
        )
    except Refusal as refusal:
        raise InfiniteVLError(refusal.culprit, refusal.cure) from None
    operators = (*map(_readable, chosen), unit_heads_for(device))
    if mesh is not None:
        wrappers = shard_attend, shard_gated_delta_rule, shard_causal_conv, shard_unit_heads
        operators = (shard(operator, mesh) for shard, operator in zip(wrappers, operators, strict=True))
    return Ops(*operators, dispatches=chosen)


def _readable(dispatch: Dispatch) -> Callable:
    """The same operator, its refusals as the error that users are meant to read."""

    def run(*args, **kwargs):
        try:
            return dispatch(*args, **kwargs)
        except Refusal as refusal:
            raise InfiniteVLError(refusal.culprit, refusal.cure) from None

    return run
