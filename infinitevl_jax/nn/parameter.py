"""A parameter and its facts: said once, where it is created.

Sharding, weight decay, the weight table of checkpoints and `infinitevl info` all read them from
here (`infinitevl_jax.nn.params.parameters`), so a new layer needs no entry anywhere else.
"""

from collections.abc import Callable
from dataclasses import dataclass

from flax import nnx
from jax import Array


@dataclass(frozen=True)
class Facts:
    """What is true of a parameter wherever it is used.

    Attributes:
      axes: the logical axis of each dimension (`infinitevl_jax.sharding.AXES`; None: never split).
      decay: whether weight decay shrinks it.
      matmul: whether it only ever multiplies activations, so that a step may hold it in their
        dtype.
      torch_name: last part of its name in a torch checkpoint; "" means the attribute's own name.
      torch_shape: its shape there.
      transposed: torch holds [out, ...]; flattened to two dimensions and transposed it is ours.
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
    """A fresh parameter.

    Args:
      init: shape -> values.
      torch_shape: left out, it is `shape`, reversed if transposed.
      others: see `Facts`.
    """
    if torch_shape is None:
        torch_shape = shape[::-1] if transposed else shape
    facts = Facts(tuple(axes), decay, matmul, torch_name, tuple(torch_shape), transposed)
    return nnx.Param(init(shape), facts=facts)
