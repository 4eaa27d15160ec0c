"""Devices that kernels are written for. A predicate returns None for its devices, else the reason
it is not one of them."""

import re

import jax

HOPPER_MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM). On a card with fewer, some thread blocks wait. Results are the same."""


def tpu(device: jax.Device) -> str | None:
    """Any TPU (Mosaic TPU kernels)."""
    return None if device.platform == "tpu" else f"for TPUs, this is {device.device_kind}"


def hopper(device: jax.Device) -> str | None:
    """Compute capability 9.0 (Mosaic GPU kernels that use wgmma)."""
    if _capability(device) == "9.0":
        return None
    return f"for Hopper GPUs, this is {device.device_kind}"


def ampere(device: jax.Device) -> str | None:
    """NVIDIA GPUs of compute capability 8.0 or more (flash attention of cuDNN)."""
    if re.fullmatch(r"([89]|\d\d)\.\d", _capability(device)):
        return None
    return f"for NVIDIA GPUs since Ampere, this is {device.device_kind}"


def _capability(device: jax.Device) -> str:
    """A GPU's compute capability, such as "9.0"; empty for other devices."""
    return getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
