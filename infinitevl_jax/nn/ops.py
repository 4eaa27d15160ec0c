"""The operators that the layers call, chosen once per run.

Layers receive an `Ops` record at construction and never choose a kernel themselves. `resolve_ops`
builds the record from the run configuration and the mesh.
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
from pallas_kernels.projection.xla import projection
from pallas_kernels.short_conv.xla import short_conv


@dataclass(frozen=True)
class Ops:
    """One callable per operator of `pallas_kernels`. The defaults are the `xla` implementations."""

    attention: Callable = attention
    gated_delta_rule: Callable = gated_delta_rule
    short_conv: Callable = short_conv
    l2norm: Callable = l2norm
    attention_step: Callable = attention_step
    gated_delta_rule_step: Callable = gated_delta_rule_step
    projection: Callable = projection
    dispatches: tuple[Dispatch, ...] = ()

    def report(self) -> list[str]:
        """One line per operator and case that ran, with the reasons for skipped implementations."""
        return [line for dispatch in self.dispatches for line in dispatch.report()]


def resolve_ops(mesh: Mesh | None = None, config: OpsConfig | None = None) -> Ops:
    """Choose the operators for a mesh. The result is cached by arguments.

    Args:
      mesh: None means this process's first device.
      config: allowed implementations; None allows all.

    Raises:
      InfiniteVLError: an implementation is unknown or does not support these devices. An operator
        raises it when called if no allowed implementation supports the case.
    """
    from pallas_kernels.operators import OPERATORS  # local: it imports the kernel compilers

    return _resolve(
        mesh,
        config or OpsConfig(),
        tuple((operator, operator.implementations) for operator in OPERATORS),
    )


@cache
def _resolve(
    mesh: Mesh | None, config: OpsConfig, operators: tuple[tuple[Operator, tuple], ...]
) -> Ops:
    """Cached part of `resolve_ops`. The registered implementations are part of the cache key."""
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
    """Wrap an operator so that refusals become InfiniteVLError."""

    def run(*args, **kwargs):
        try:
            return dispatch(*args, **kwargs)
        except Refusal as refusal:
            raise InfiniteVLError(refusal.culprit, refusal.cure) from None

    return run
