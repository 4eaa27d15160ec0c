"""From a run's configuration to a mesh over the machine's devices."""

import math
from collections import Counter
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from infinitevl_jax.config.run import AXES, RunConfig
from infinitevl_jax.errors import InfiniteVLError


def make_mesh(run: RunConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with axes data, fsdp, tensor, context.

    Args:
      run: sizes of the axes; an axis of -1 takes the remaining devices.
      devices: None means all devices of all processes. One process may leave devices unused.

    Raises:
      InfiniteVLError: the devices do not fit the mesh.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(run, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    have = f"{len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}"
    open_axis = next((axis for axis, size in sizes.items() if size == -1), None)
    if fixed > len(devices):
        raise InfiniteVLError(
            f"the mesh {asked} needs {fixed} devices, this machine has {have}",
            "make run.data, run.fsdp or run.tensor smaller (on a CPU, jax's option"
            " jax_num_cpu_devices makes more devices)",
        )
    if open_axis is not None:
        if len(devices) % fixed:
            raise InfiniteVLError(
                f"the mesh {asked} cannot use all of {have}: {len(devices)} is not a multiple of"
                f" {fixed}",
                f"choose sizes that divide {len(devices)}, or give run.{open_axis} a number",
            )
        sizes[open_axis] = len(devices) // fixed
    elif jax.process_count() > 1 and fixed != len(devices):
        raise InfiniteVLError(
            f"the mesh {asked} uses {fixed} of {have}",
            "with several processes every device takes part: set one axis to -1",
        )
    of_process = Counter(device.process_index for device in devices)
    if len(set(of_process.values())) > 1:
        numbers = ", ".join(f"{count} in process {i}" for i, count in sorted(of_process.items()))
        raise InfiniteVLError(
            f"the processes have different numbers of devices: {numbers}",
            "start each with as many (--local-devices, or what the launcher gives each)",
        )
    chosen = devices[: math.prod(sizes.values())]
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=chosen
    )


def own_parts(mesh: Mesh) -> tuple[list[int], int]:
    """Shards of a batch that this process's devices hold, by number, and how many there are."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if jax.process_count() == 1:  # the devices may be those of a pod that is compiled for
        return list(range(parts)), parts
    devices, here = mesh.devices.reshape(parts, -1), jax.process_index()
    return [i for i in range(parts) if any(d.process_index == here for d in devices[i])], parts


def own_rows(mesh: Mesh, batch: int) -> list[int]:
    """Rows of a global batch that this process's devices hold.

    Raises:
      InfiniteVLError: the batch does not divide over data x fsdp.
    """
    own, parts = own_parts(mesh)
    size = part_size(batch, parts)
    return [row for part in own for row in range(part * size, (part + 1) * size)]


def part_size(batch: int, parts: int) -> int:
    """Rows of each shard of a batch. Raises InfiniteVLError if it does not divide: replication
    would hide that."""
    if batch % parts:
        raise InfiniteVLError(
            f"a batch of {batch} rows does not divide over data x fsdp = {parts}",
            f"make train.data.batch a multiple of {parts}, or the mesh smaller (run.data,"
            " run.fsdp)",
        )
    return batch // parts
