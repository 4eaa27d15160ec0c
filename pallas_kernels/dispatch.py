"""Operators, their implementations, and the choice of one: by name, or the first that can run and
is not known to be slower than a later one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from pallas_kernels.columns import Columns
from pallas_kernels.partition import OperatorMesh


class Refusal(ValueError):
    """No allowed implementation takes a call, or no implementation has that name."""

    def __init__(self, culprit: str, cure: str):
        super().__init__(f"{culprit}\n  -> {cure}")
        self.culprit, self.cure = culprit, cure


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    run: takes the operator's arguments by name and returns its results.
    device: returns the reason it cannot run on the device, else None.
    supports: returns the reason it does not take these arguments (arrays, or shapes with dtypes),
        else None.
    gradients_by: returns the name of the implementation that computes its gradients, None for its
        own.
    unordered: results and gradients ("d_q") that are summed in no fixed order, so that two calls
        may differ in rounding. All others are equal bit for bit in every call.
    slower: returns the reason why a later implementation is preferred for arguments that this one
        takes, else None. It counts where the caller names none.
    """

    name: str
    run: Callable
    device: Callable[[jax.Device], str | None] = lambda device: None
    supports: Callable[..., str | None] = lambda *args, **kwargs: None
    gradients_by: Callable[..., str | None] = lambda *args, **kwargs: None
    unordered: tuple[str, ...] = ()
    slower: Callable[..., str | None] = lambda *args, **kwargs: None


@dataclass(eq=False)
class Operator:
    """An operator: contract, implementations in order of preference, partitioning.

    arguments: takes a call's arguments, fills in the defaults, raises ValueError where shapes do
        not fit, and returns all of them by name.
    partition: takes an implementation of the contract and an OperatorMesh, and returns the operator
        over the arrays of the whole mesh.
    """

    name: str
    arguments: Callable[..., dict]
    partition: Callable[[Callable, OperatorMesh], Callable]
    implementations: tuple[Implementation, ...]

    def register(self, implementation: Implementation, before: str | None = None) -> None:
        """Add an implementation in front of the one named `before`, by default in front of all."""
        names = [i.name for i in self.implementations]
        if implementation.name in names:
            raise ValueError(
                f"{self.name} has an implementation {implementation.name!r} already\n  -> give"
                " another name"
            )
        if before is not None and before not in names:
            raise Refusal(
                f"{self.name} has no implementation {before!r}", f"choose among {', '.join(names)}"
            )
        place = 0 if before is None else names.index(before)
        self.implementations = (
            *self.implementations[:place],
            implementation,
            *self.implementations[place:],
        )

    def __call__(self, *args, implementation: str | None = None, **kwargs):
        """Run on this process's first device. implementation: as `Dispatch.names`."""
        return Dispatch(self, jax.devices()[0], implementation)(*args, **kwargs)


@dataclass(eq=False)
class Dispatch:
    """An operator on one kind of device, called by its contract.

    names: the implementations allowed, in order, such as "mosaic_gpu" or "mosaic_gpu,xla". None
        allows all of them.
    ran: by case, the chosen implementation and the reasons why those before it were not. Filled
        while programs are traced.
    """

    operator: Operator
    device: jax.Device
    names: str | None = None
    ran: dict[str, str] = field(default_factory=dict)
    allowed: Sequence[Implementation] = field(init=False)

    def __post_init__(self):
        self.allowed = self.operator.implementations
        if self.names is None:
            return
        known, name = {i.name: i for i in self.allowed}, self.operator.name
        for asked in self.names.split(","):
            if asked not in known:
                raise Refusal(
                    f"{name} has no implementation {asked!r}", f"choose among {', '.join(known)}"
                )
        self.allowed = [known[asked] for asked in self.names.split(",")]
        if all(i.device(self.device) for i in self.allowed):
            reasons = "; ".join(f"{i.name}: {i.device(self.device)}" for i in self.allowed)
            raise Refusal(
                f"{name} cannot run as asked: {reasons}", "name another implementation, or none"
            )

    def choose(self, *args, **kwargs) -> tuple[Implementation, list[str]]:
        """The implementation for these arguments, and why those before it were not chosen.

        Raises Refusal, with all reasons, where every allowed implementation refuses.
        """
        return self._choose(self.operator.arguments(*args, **kwargs))

    def __call__(self, *args, **kwargs):
        call = self.operator.arguments(*args, **kwargs)
        option, reasons = self._choose(call)
        other = option.gradients_by(**call)
        by = option.name + (f", gradients by {other}" if other else "")
        self.ran[self._case(call)] = by + (f" ({'; '.join(reasons)})" if reasons else "")
        return option.run(**call)

    def report(self) -> list[str]:
        """A line for each case so far: what ran, and why no preferred implementation did."""
        return [f"{self.operator.name} of {case}: {what}" for case, what in self.ran.items()]

    def _choose(self, call: dict) -> tuple[Implementation, list[str]]:
        reasons, spare = [], None  # spare: the first that was slower, and the reasons before it
        for option in self.allowed:
            reason = option.device(self.device) or option.supports(**call)
            if reason is None:
                reason = None if self.names else option.slower(**call)
                if reason is None:
                    return option, reasons
                spare = spare or (option, [*reasons])
            reasons.append(f"{option.name}: {reason}")
        if spare is not None:
            return spare
        cure = (
            'name another as well ("NAME,xla"), or none to take the first that can'
            if self.names
            else "change the case"
        )
        raise Refusal(
            f"{self.operator.name} cannot run on {self._case(call)}: " + "; ".join(reasons), cure
        )

    def _case(self, call: dict) -> str:
        leaves = jax.tree.leaves(list(call.values()), is_leaf=lambda x: isinstance(x, Columns))
        arrays = [x for x in leaves if hasattr(x, "dtype")][:3]
        shapes = [f"{np.dtype(x.dtype).name}{list(x.shape)}" for x in arrays]
        mask = f", {call['mask']}" if "mask" in call else ""
        return f"{', '.join(shapes)}{mask} on {self.device.device_kind}"
