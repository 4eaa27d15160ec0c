"""The short convolution on a mesh: rows over the batch axes, channels with their heads."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.columns import values
from pallas_kernels.partition import OperatorMesh
from pallas_kernels.short_conv.api import arguments


def partition_short_conv(short_conv: Callable, mesh: OperatorMesh) -> Callable:
    """The contract of `short_conv` over the arrays of a mesh."""

    def run(*args, **kwargs):
        call = arguments(*args, **kwargs)
        call["x"] = values(call["x"])
        call["weight"] = call["weight"].astype(jnp.float32)  # its gradient is summed over devices
        batch, channels = mesh.rows(call["x"].shape[0]), mesh.heads(call["x"].shape[2])
        tokens, rows = PartitionSpec(batch, None, channels), PartitionSpec(batch, None)
        specs = tokens, PartitionSpec(None, channels), tokens, rows, rows
        given = {name: (x, spec) for (name, x), spec in zip(call.items(), specs, strict=True)}
        return mesh.run(short_conv, given, (tokens, tokens))

    return run
