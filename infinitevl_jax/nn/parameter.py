"""Parameters with their facts, stated where a parameter is created.

Sharding, weight decay, the checkpoint weight table and `infinitevl info` are derived from them
(`infinitevl_jax.nn.params.parameters`). A new layer needs no entry anywhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flax import nnx
from jax import Array


@dataclass(frozen=True)
class Facts:
    """Properties of a parameter that the optimiser, checkpoints and sharding need.

    Attributes:
        axes: logical axis of each dimension (`infinitevl_jax.sharding.rules.AXES`), or None.
        decay: apply weight decay.
        matmul: only multiplies activations, so a training step may cast it to their dtype.
        torch_name: last part of the name in a torch checkpoint; "" is the attribute's own name.
        torch_shape: shape in a torch checkpoint.
        transposed: torch holds [out, ...]; the parameter is that flattened to 2-D and transposed.
    """

    axes: tuple[str | None, ...]
    decay: bool
    matmul: bool
    torch_name: str
    torch_shape: tuple[int, ...]
    transposed: bool


def parameter(
    shape: tuple[int, ...],
    init: Callable[[tuple[int, ...]], Array],
    axes: tuple[str | None, ...],
    *,
    decay: bool = True,
    matmul: bool = False,
    torch_name: str = "",
    torch_shape: tuple[int, ...] | None = None,
    transposed: bool = False,
) -> nnx.Param:
    """Create a parameter.

    Args:
      init: maps the shape to the initial values.
      torch_shape: None is `shape`, reversed if transposed.
      axes, decay, matmul, torch_name, transposed: see `Facts`.
    """
    if torch_shape is None:
        torch_shape = shape[::-1] if transposed else shape
    facts = Facts(tuple(axes), decay, matmul, torch_name, tuple(torch_shape), transposed)
    return nnx.Param(init(shape), facts=facts)
