"""Whether a run's state can fit its devices, before anything is made."""

import os
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from infinitevl_jax.errors import InfiniteVLError


def check_memory(
    shapes: Mapping[str, jax.ShapeDtypeStruct], trainable: Sequence[str], mesh: Mesh
) -> None:
    """Raise InfiniteVLError if the parameters, with two float32 moments for each that trains, take
    more than all devices of the mesh have together.

    What a step needs beside them is not counted: a run that passes may still run out of memory.
    """
    names = set(trainable)
    needed = sum(s.size * (12 if name in names else s.dtype.itemsize) for name, s in shapes.items())
    has = _memory(mesh)
    if has is not None and needed > has:
        raise InfiniteVLError(
            f"parameters and moments take {needed / 1e9:,.1f} GB, the devices of this mesh have"
            f" {has / 1e9:,.1f} GB",
            "make the model smaller, train fewer parameters (train.trainable), or use more devices"
            " (run.fsdp)",
        )


def _memory(mesh: Mesh) -> int | None:
    """Bytes of all devices together, None where they do not say."""
    devices = list(mesh.devices.reshape(-1))
    if devices[0].platform == "cpu":  # all are this one machine
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return sum(limits) if all(limits) else None
