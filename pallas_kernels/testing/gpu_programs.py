"""Compiles programs for an H100 on a machine without a GPU, and lists the kernels of the result.

XLA's compiler for CUDA needs a description of the device only:

    pip install --no-deps jax-cuda13-plugin==X jax-cuda13-pjrt==X nvidia-cuda-nvcc nvidia-nvvm \\
        nvidia-cuda-crt        # X: the version of jax

What it cannot do without the device is to time its choices, so sizes of tiles and the library that
multiplies may differ from those on a GPU. Fusions, layouts and copies are the same.
"""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
NO_KERNELS = {
    "after-all", "bitcast", "constant", "get-tuple-element", "parameter", "tuple", "while",
}  # fmt: skip


class Launch(NamedTuple):
    """An instruction of a compiled program that is a kernel, a library call, or several of them.

    Attributes:
      name: such as "loop_pad_fusion.4". kind: the HLO operation, or the target of a custom call.
      result: its type with layout, such as "bf16[8,2048]{1,0}".
      origin: the operation of the traced program that it came from.
    """

    name: str
    kind: str
    result: str
    origin: str


def refusal() -> str | None:
    """The reason why nothing can be compiled for a GPU here, else None."""
    if find_spec("jax_plugins") is None or find_spec("jax_plugins.xla_cuda13") is None:
        return f"jax-cuda13-plugin=={jax.__version__} is not installed"
    return None


def h100() -> jax.Device:
    """An H100 to compile for. Raises RuntimeError where `refusal` gives a reason."""
    if reason := refusal():
        raise RuntimeError(
            f"cannot compile for an H100: {reason}\n  -> install what the first lines of"
            f" {__name__} name"
        )
    described = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")
    return described.devices[0]


def on(device: jax.Device, tree):
    """Arrays or shapes -> shapes on that device."""
    place = SingleDeviceSharding(device)

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=place)

    return jax.tree.map(shape, tree)


def launches(hlo: str) -> list[Launch]:
    """Those of the computation that has most of them: the whole program, or the body of its loop.

    Fused computations and branches of conditionals are not counted by themselves.
    """
    return max(_computations(hlo), key=len)


def _computations(hlo: str) -> Iterator[list[Launch]]:
    computation = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.S | re.M)
    for name, body in computation.findall(hlo):
        if not re.match(r"(fused|wrapped|gemm_fusion|\w*_fusion)", name):
            yield list(_launches(body))


def _launches(body: str) -> Iterator[Launch]:
    for line in body.splitlines():
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(", line)
        if not found or found[3] in NO_KERNELS:
            continue
        target = re.search(r'custom_call_target="([^"]*)"', line)
        origin = re.search(r'op_name="([^"]*)"', line)
        kind = target[1] if target else found[3]
        yield Launch(found[1], kind, found[2], origin[1] if origin else "")
