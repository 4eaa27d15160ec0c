"""Device mesh, sharding rules and sharding constraints."""

from infinitevl_jax.sharding.mesh import make_mesh, own_parts, own_rows, part_size
from infinitevl_jax.sharding.rules import (
    batch_parts,
    check_mesh,
    constrain,
    kept_whole,
    operator_mesh,
    parameter_shardings,
    spec,
    to_host,
)

__all__ = [
    "batch_parts",
    "check_mesh",
    "constrain",
    "kept_whole",
    "make_mesh",
    "operator_mesh",
    "own_parts",
    "own_rows",
    "parameter_shardings",
    "part_size",
    "spec",
    "to_host",
]
