"""Compilations and peak memory of a piece of work."""

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path

import jax

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Compilations:
    """Counts the programs that are compiled, or loaded from the compilation cache."""

    def __init__(self):
        self.count = self._mark = 0

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within, compilations are counted."""

        def listen(event: str, seconds: float, **_) -> None:
            self.count += event == "/jax/core/compile/backend_compile_duration"

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    def warm(self) -> None:
        """The warm-up is over."""
        self._mark = self.count

    def since(self) -> dict[str, int]:
        """Compilations after the warm-up, for a record."""
        return {"compilations": self.count - self._mark}


def begin_memory() -> None:
    """Free what earlier parts left, and let the host's peak start anew (Linux)."""
    gc.collect()
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def memory() -> dict[str, float]:
    """Gigabytes: now and at most, of the device and of this process on the host.

    The device's peak is that of the process so far: it cannot be reset.
    """
    stats = jax.devices()[0].memory_stats() or {}
    found = {
        "device_GB": stats.get("bytes_in_use"),
        "device_peak_GB_so_far": stats.get("peak_bytes_in_use"),
        "host_GB": _status("VmRSS"),
        "host_peak_GB": _status("VmHWM"),
    }
    return {name: round(value / 1e9, 3) for name, value in found.items() if value is not None}


def _status(name: str) -> int | None:
    try:
        lines = STATUS.read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)
