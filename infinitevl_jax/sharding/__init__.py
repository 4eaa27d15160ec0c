"""Device mesh, sharding rules and sharding constraints."""

from infinitevl_jax.sharding.mesh import make_mesh
from infinitevl_jax.sharding.rules import (
    batch_parts,
    check_mesh,
    constrain,
    kept_whole,
    operator_mesh,
    parameter_shardings,
    spec,
)

__all__ = [
    "batch_parts",
    "check_mesh",
    "constrain",
    "kept_whole",
    "make_mesh",
    "operator_mesh",
    "parameter_shardings",
    "spec",
]
