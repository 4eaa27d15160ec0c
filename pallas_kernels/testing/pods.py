"""Compiles a program for a TPU pod on a machine without one: libtpu's compiler runs on any CPU
(`pip install libtpu`)."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

# bytes of high-bandwidth memory behind one JAX device
HBM = {"v5e": 16e9, "v5p": 95e9, "v6e": 32e9, "tpu7x": 96e9}


class PodReport(NamedTuple):
    """What the compiler says of one chip."""

    arguments: int  # bytes of inputs (parameters, moments, batch)
    outputs: int  # bytes of results that do not reuse an input's memory
    temporaries: int  # bytes at the worst moment besides
    hlo: str  # the compiled program as text

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs + self.temporaries


def pod_devices(topology: str) -> int:
    """Number of JAX devices of a topology."""
    return len(topologies.get_topology_desc(topology, platform="tpu").devices)


def pod_mesh(topology: str, sizes: dict[str, int]) -> Mesh:
    """A mesh over the abstract devices of a topology such as "v5p:4x4x4" or "v6e:8x8"; `sizes`
    by axis name, -1 for the rest."""
    described = topologies.get_topology_desc(topology, platform="tpu")
    count = len(described.devices)
    fixed = 1
    for size in sizes.values():
        fixed *= 1 if size == -1 else size
    shape = tuple(count // fixed if size == -1 else size for size in sizes.values())
    # as jax.make_mesh does: else an axis of 2 finds no place in a torus of 4 x 4 x 4
    devices = mesh_utils.create_device_mesh(
        shape, described.devices, allow_split_physical_axes=True
    )
    return Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def compile_for_pod(
    function: Callable,
    mesh: Mesh,
    *arguments,
    text: bool = False,
    compiler_options: Mapping[str, Any] | None = None,
    **jit_options,
) -> PodReport:
    """Compile `function` for the mesh's devices; arguments are ShapeDtypeStructs with shardings.
    `text` keeps the program as HLO."""
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        # the compiler's own dump: asked for its text, a program with some asynchronous copies fails
        # a check of XLA's
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if text else {}
        options = {**(compiler_options or {}), **dump}
        compiled = (
            jax.jit(function, **jit_options).lower(*arguments).compile(compiler_options=options)
        )
        hlo = "".join(
            path.read_text("utf-8") for path in Path(folder).glob("*.after_optimizations.txt")
        )
    if text and not hlo:
        raise RuntimeError(
            "the compiler left no text of the program\n  -> see what its dump is called in this"
            " libtpu"
        )
    memory = compiled.memory_analysis()
    return PodReport(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        hlo=hlo,
    )
