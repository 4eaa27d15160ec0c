"""Parameters with their facts, stated where a parameter is created.

Sharding, weight decay, the checkpoint weight table and `infinitevl info` are derived from them
(`infinitevl_jax.nn.params.parameters`). A new layer needs no entry anywhere else.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from infinitevl_jax.nn.initializers import Initializer


@dataclass(frozen=True)
class Facts:
    """Properties of a parameter that its start, the optimiser, checkpoints and sharding need.

    Attributes:
        init: maps a random key and the shape to the initial values.
        axes: logical axis of each dimension (`infinitevl_jax.sharding.rules.AXES`), or None.
        decay: apply weight decay.
        matmul: only multiplies activations, so a training step may cast it to their dtype.
        torch_name: last part of the name in a torch checkpoint; "" is the attribute's own name.
        torch_shape: shape in a torch checkpoint.
        transposed: torch holds [out, ...]; the parameter is that flattened to 2-D and transposed.
    """

    init: Initializer
    axes: tuple[str | None, ...]
    decay: bool
    matmul: bool
    torch_name: str
    torch_shape: tuple[int, ...]
    transposed: bool


def parameter(
    shape: tuple[int, ...],
    init: Initializer,
    axes: tuple[str | None, ...],
    *,
    decay: bool = True,
    matmul: bool = False,
    torch_name: str = "",
    torch_shape: tuple[int, ...] | None = None,
    transposed: bool = False,
) -> nnx.Param:
    """Create a parameter without values: a model gets them when it is bound to its parameters
    (`infinitevl_jax.nn.params.functional`).

    Args:
      init: a function of a module, or a frozen dataclass with `__call__`. Layers with equal facts
        share a trace, and functions made anew for each layer would never be equal.
      torch_shape: None is `shape`, reversed if transposed.
      axes, decay, matmul, torch_name, transposed: see `Facts`.

    Raises:
      ValueError: `init` was made anew for this layer.
    """
    anew = isinstance(init, functools.partial) or "<locals>" in getattr(init, "__qualname__", "")
    if anew:
        raise ValueError(f"{init} is made anew for each layer: define it at the top of a module")
    if torch_shape is None:
        torch_shape = shape[::-1] if transposed else shape
    facts = Facts(init, tuple(axes), decay, matmul, torch_name, tuple(torch_shape), transposed)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), facts=facts)


def stacked(params: Any, *layers: int) -> Any:
    """Parameters without values, with leading axes over layers."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct((*layers, *p.shape), p.dtype), params)
