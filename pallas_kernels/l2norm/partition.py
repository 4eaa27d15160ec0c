"""The per-head L2 normalisation on a mesh, for x [batch, length, heads * dim]."""

from collections.abc import Callable

from jax import Array
from jax.sharding import PartitionSpec

from pallas_kernels.partition import OperatorMesh


def partition_l2norm(l2norm: Callable, mesh: OperatorMesh) -> Callable:
    """The contract of `l2norm` over the arrays of a mesh: heads over the head axes."""

    def run(x: Array, heads: int, eps: float) -> Array:
        split = mesh.heads(heads)
        place = PartitionSpec(mesh.rows(len(x)), None, split)
        own = heads // (mesh.head_shards if split else 1)
        return mesh.shard_map(lambda x: l2norm(x, own, eps), place, place)(x)

    return run
