"""The operators of `pallas_kernels`, as one record handed to the mixers at construction.

Layers never choose a kernel: whoever builds the model resolves the record once, from the run
  configuration
and the mesh.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache

import jax
from jax.sharding import Mesh

from infinitevl_jax.config.run import OpsConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.sharding import operator_mesh
from pallas_kernels.attention.step import step as attention_step
from pallas_kernels.attention.xla import attention
from pallas_kernels.dispatch import Dispatch, Operator, Refusal
from pallas_kernels.gated_delta_rule.step import step as gated_delta_rule_step
from pallas_kernels.gated_delta_rule.xla import gated_delta_rule
from pallas_kernels.l2norm.xla import l2norm
from pallas_kernels.short_conv.xla import short_conv


@dataclass(frozen=True)
class Ops:
    """Operators with the signatures of `pallas_kernels`; by default the portable
    implementations."""

    attention: Callable = attention
    gated_delta_rule: Callable = gated_delta_rule
    short_conv: Callable = short_conv
    l2norm: Callable = l2norm
    attention_step: Callable = attention_step
    gated_delta_rule_step: Callable = gated_delta_rule_step
    dispatches: tuple[Dispatch, ...] = ()

    def report(self) -> list[str]:
        """A line for each operator and case that ran so far, with the reasons of preferred
        implementations that did not."""
        return [line for dispatch in self.dispatches for line in dispatch.report()]


def resolve_ops(mesh: Mesh | None = None, config: OpsConfig | None = None) -> Ops:
    """The operators for the devices of a mesh (None: this process's first device).

    config: which implementations are allowed; None allows all. The same arguments give the same
      record.
    Raises InfiniteVLError for an unknown name, or one that is not for these devices; the operators
    do for a case that no allowed implementation takes.
    """
    from pallas_kernels.operators import OPERATORS  # imports the kernels' compilers

    return _resolve(
        mesh,
        config or OpsConfig(),
        tuple((operator, operator.implementations) for operator in OPERATORS),
    )


@cache
def _resolve(
    mesh: Mesh | None, config: OpsConfig, operators: tuple[tuple[Operator, tuple], ...]
) -> Ops:
    """`operators` with what is registered for them now, which is part of the cache's key."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    names = {field.name for field in fields(config)}
    run, dispatches = {}, []
    for operator, _ in operators:
        try:
            dispatch = Dispatch(
                operator, device, getattr(config, operator.name) if operator.name in names else None
            )
        except Refusal as refusal:
            raise InfiniteVLError(refusal.culprit, refusal.cure) from None
        dispatches.append(dispatch)
        run[operator.name] = _readable(dispatch)
        if mesh is not None and mesh.size > 1:
            run[operator.name] = operator.partition(run[operator.name], operator_mesh(mesh))
    return Ops(**run, dispatches=tuple(dispatches))


def _readable(dispatch: Dispatch) -> Callable:
    """The same operator, its refusals as errors that users read."""

    def run(*args, **kwargs):
        try:
            return dispatch(*args, **kwargs)
        except Refusal as refusal:
            raise InfiniteVLError(refusal.culprit, refusal.cure) from None

    return run
