"""Text of `infinitevl --version`."""

from collections import Counter

import flax
import jax
import jaxlib

from infinitevl_jax import __version__, compilation


def describe() -> str:
    """Versions, devices and compilation cache, in four lines."""
    try:
        devices = jax.devices()
        kinds = Counter(device.device_kind for device in devices)
        backend = f"{devices[0].platform}: " + ", ".join(
            f"{count} x {kind}" for kind, count in kinds.items()
        )
    except RuntimeError as error:  # a missing or outdated driver
        backend = f"none that works: {str(error).splitlines()[0]}"
    path, reason = compilation.folder()
    programs = list(path.glob("*-cache")) if path and path.is_dir() else []
    held = (
        f"{path} ({len(programs)} programs, {sum(p.stat().st_size for p in programs) / 1e6:.1f} MB)"
        if path
        else f"off: {reason}"
    )
    return "\n".join(
        (
            f"infinitevl_jax {__version__}",
            f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, flax {flax.__version__}",
            f"backend {backend}",
            f"compilation cache {held}",
        )
    )
