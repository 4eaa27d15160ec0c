"""Which implementation of an operator runs: the one asked for by name, or the first that takes the case on this device."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np


class Refusal(ValueError):
    """No implementation that is allowed takes a case, or there is none of that name."""

    def __init__(self, culprit: str, cure: str):
        super().__init__(f"{culprit}\n  -> {cure}")
        self.culprit, self.cure = culprit, cure


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    run: the operator's contract. device: why not on this device, or None. supports: why not these arguments (arrays or their
    shapes, as `run` takes them), or None. gradients_by: the name of the one whose gradients they get, or None if its own.
    unordered: results and gradients ("d_q") that are summed in no fixed order, so that two calls differ in rounding. All others
    of its results are the same bit for bit in each call.
    """

    name: str
    run: Callable
    device: Callable[[jax.Device], str | None] = lambda device: None
    supports: Callable[..., str | None] = lambda *args, **kwargs: None
    gradients_by: Callable[..., str | None] = lambda *args, **kwargs: None
    unordered: tuple[str, ...] = ()


@dataclass(eq=False)
class Dispatch:
    """An operator on one kind of device, called by its contract.

    implementations: in order of preference. names: the only ones allowed, in order, such as "mosaic_gpu" or "mosaic_gpu,xla"; None
    allows all. ran: what was chosen, by case, and why not those before it; filled while programs are traced.
    """

    operator: str
    implementations: Sequence[Implementation]
    device: jax.Device
    names: str | None = None
    ran: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if self.names is None:
            return
        known = {i.name: i for i in self.implementations}
        for name in self.names.split(","):
            if name not in known:
                raise Refusal(f"{self.operator} has no implementation {name!r}", f"choose among {', '.join(known)}")
        self.implementations = [known[name] for name in self.names.split(",")]
        reasons = [f"{i.name}: {i.device(self.device)}" for i in self.implementations]
        if all(i.device(self.device) for i in self.implementations):
            raise Refusal(f"{self.operator} cannot run as asked: " + "; ".join(reasons), "name another implementation, or none")

    def choose(self, *args, **kwargs) -> tuple[Implementation, list[str]]:
        """The implementation for these arguments, and the reasons of those passed over.

        Raises Refusal where every one allowed refuses; the message holds the reasons.
        """
        reasons = []
        for option in self.implementations:
            reason = option.device(self.device) or option.supports(*args, **kwargs)
            if reason is None:
                return option, reasons
            reasons.append(f"{option.name}: {reason}")
        cure = 'name another as well ("NAME,xla"), or none to take the first that can' if self.names else "change the case"
        raise Refusal(f"{self.operator} cannot run on {self._case(args, kwargs)}: " + "; ".join(reasons), cure)

    def __call__(self, *args, **kwargs):
        option, reasons = self.choose(*args, **kwargs)
        other = option.gradients_by(*args, **kwargs)
        by = option.name + (f", gradients by {other}" if other else "")
        self.ran[self._case(args, kwargs)] = by + (f" ({'; '.join(reasons)})" if reasons else "")
        return option.run(*args, **kwargs)

    def report(self) -> list[str]:
        """A line for each case met so far: what ran, and why nothing preferred to it."""
        return [f"{self.operator} of {case}: {what}" for case, what in self.ran.items()]

    def _case(self, args, kwargs) -> str:
        shapes = [f"{np.dtype(x.dtype).name}{list(x.shape)}" for x in args[:3] if x is not None]
        rule = [f", {x}" for name, x in kwargs.items() if name == "mask"]
        return f"{', '.join(shapes)}{''.join(rule)} on {self.device.device_kind}"


def hopper(device: jax.Device) -> str | None:
    """The devices of Mosaic GPU kernels that use wgmma: compute capability 9.0."""
    return None if _capability(device) == "9.0" else f"for Hopper GPUs, this is {device.device_kind}"


def ampere(device: jax.Device) -> str | None:
    """The devices of cuDNN's flash attention: NVIDIA GPUs of compute capability 8.0 or more."""
    capability = _capability(device)
    return None if re.fullmatch(r"([89]|\d\d)\.\d", capability) else f"for NVIDIA GPUs since Ampere, this is {device.device_kind}"


def _capability(device: jax.Device) -> str:
    """A GPU's compute capability, "9.0" say; empty for what is no GPU."""
    return getattr(device, "compute_capability", "") if device.platform == "gpu" else ""


def tpu(device: jax.Device) -> str | None:
    """The devices of Mosaic TPU kernels."""
    return None if device.platform == "tpu" else f"for TPUs, this is {device.device_kind}"
