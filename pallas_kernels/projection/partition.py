"""The projection on a mesh: rows over the batch axes, columns of the matrix over the head axes.

Every matrix is split by its columns, those behind heads or hidden units too. Their inputs, a few
rows, are gathered. No partial sums are added over devices.
"""

from collections.abc import Callable
from functools import partial

from jax.sharding import PartitionSpec

from pallas_kernels.partition import OperatorMesh
from pallas_kernels.projection.api import arguments, sizes


def partition_projection(projection: Callable, mesh: OperatorMesh) -> Callable:
    """The contract of `projection` over the arrays of a mesh."""

    def run(*args, **kwargs):
        call = arguments(*args, **kwargs)
        eps, transposed = call.pop("eps"), call.pop("transposed")
        call.pop("prefetch")  # a device's part of it is not told apart
        weight = call["weight"]
        rows = mesh.rows(len(call["x"]))
        columns = mesh.heads(sizes(weight, transposed)[1])
        pair = (None,) * (weight.ndim - 2)
        specs = {
            "x": PartitionSpec(rows, None),
            "weight": PartitionSpec(*pair, columns, None)
            if transposed
            else PartitionSpec(None, *pair, columns),
            "bias": PartitionSpec(*pair, columns),
            "residual": PartitionSpec(rows, columns),
            "norm": PartitionSpec(None),
        }
        local = partial(projection, eps=eps, transposed=transposed)
        given = {name: (x, specs[name]) for name, x in call.items()}
        return mesh.run(local, given, PartitionSpec(rows, columns))

    return run
