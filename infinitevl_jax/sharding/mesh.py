"""From a run's configuration to a mesh over the machine's devices."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from infinitevl_jax.config.run import AXES, RunConfig
from infinitevl_jax.errors import InfiniteVLError


def make_mesh(run: RunConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh with axes data, fsdp, tensor, context.

    Args:
      run: sizes of the axes; an axis of -1 takes the remaining devices.
      devices: None means all devices of the process group.

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
    chosen = devices[: math.prod(sizes.values())]
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=chosen
    )
