"""Which implementation of an operator runs: the one asked for by name, or the first that takes the case on this device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    run: the operator's contract. device: why not on this device, or None. supports: why not these arguments (arrays or their
    shapes, as `run` takes them), or None.
    """

    name: str
    run: Callable
    device: Callable[[jax.Device], str | None] = lambda device: None
    supports: Callable[..., str | None] = lambda *args, **kwargs: None


@dataclass(eq=False)
class Dispatch:
    """An operator on one kind of device, called by its contract.

    implementations: in order of preference. name: the only one allowed, or None. ran: what was chosen, by case, and why not those
    that are preferred to it; filled while programs are traced.
    """

    operator: str
    implementations: Sequence[Implementation]
    device: jax.Device
    name: str | None = None
    ran: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        names = [i.name for i in self.implementations]
        if self.name is not None and self.name not in names:
            raise ValueError(f"{self.operator} has no implementation {self.name!r}\n  -> choose among {', '.join(names)}")

    def choose(self, *args, **kwargs) -> tuple[Implementation, list[str]]:
        """The implementation for these arguments, and the reasons of those passed over.

        Raises ValueError where the one named, or every one, refuses; the message holds the reasons.
        """
        reasons = []
        for option in self.implementations:
            if self.name not in (None, option.name):
                continue
            reason = option.device(self.device) or option.supports(*args, **kwargs)
            if reason is None:
                return option, reasons
            reasons.append(f"{option.name}: {reason}")
        cure = "name another implementation, or none to take the first that can" if self.name else "change the case"
        raise ValueError(f"{self.operator} cannot run on {self._case(args)}\n  " + "\n  ".join(reasons) + f"\n  -> {cure}")

    def __call__(self, *args, **kwargs):
        option, reasons = self.choose(*args, **kwargs)
        self.ran[self._case(args)] = option.name + (f" ({'; '.join(reasons)})" if reasons else "")
        return option.run(*args, **kwargs)

    def report(self) -> list[str]:
        """A line for each case met so far: what ran, and why nothing preferred to it."""
        return [f"{self.operator} of {case}: {what}" for case, what in self.ran.items()]

    def _case(self, args) -> str:
        shapes = [f"{np.dtype(x.dtype).name}{list(x.shape)}" for x in args[:3]]
        return f"{', '.join(shapes)} on {self.device.device_kind}"


def hopper(device: jax.Device) -> str | None:
    """The devices of Mosaic GPU kernels that use wgmma: compute capability 9.0."""
    capability = getattr(device, "compute_capability", None)
    return None if device.platform == "gpu" and capability == "9.0" else f"for Hopper GPUs, this is {device.device_kind}"


def tpu(device: jax.Device) -> str | None:
    """The devices of Mosaic TPU kernels."""
    return None if device.platform == "tpu" else f"for TPUs, this is {device.device_kind}"
