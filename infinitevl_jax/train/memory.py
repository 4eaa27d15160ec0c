"""Check that a run's state fits the devices, before anything is allocated."""

import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import jax
from jax.sharding import Mesh

from infinitevl_jax.errors import InfiniteVLError


def check_memory(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    trainable: Sequence[str],
    mesh: Mesh,
    teacher: Mapping[str, jax.ShapeDtypeStruct] = MappingProxyType({}),
    replicated: bool = False,
) -> None:
    """Raise InfiniteVLError if parameters and optimiser moments exceed the memory of the mesh.

    Trained parameters have two float32 moments. Activations are not counted, so a run that passes
    may still run out of memory; nor are the parameters that a teacher may share with the student.
    Frozen parameters count as bfloat16, if they are not wider.

    replicated: each device holds the whole teacher.
    """
    names = set(trainable)
    needed = sum(s.size * (12 if name in names else 2) for name, s in shapes.items())
    alone = [s for name, s in teacher.items() if name not in shapes or name in names]
    needed += sum(s.size * 2 for s in alone) * (mesh.size if replicated else 1)
    has = _memory(mesh)
    if has is not None and needed > has:
        raise InfiniteVLError(
            f"parameters and moments take {needed / 1e9:,.1f} GB, the devices of this mesh have"
            f" {has / 1e9:,.1f} GB",
            "make the model smaller, train fewer parameters (train.trainable), or use more devices"
            " (run.fsdp)",
        )


def _memory(mesh: Mesh) -> int | None:
    """Bytes of all devices together; None if unknown."""
    devices = list(mesh.devices.reshape(-1))
    if devices[0].platform == "cpu":  # all CPU devices share the machine's memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()
    own = [device for device in devices if device.process_index == jax.process_index()]
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in own]
    return sum(limits) * len(devices) // len(own) if own and all(limits) else None
