"""Parameters with their facts, stated where a parameter is created.

Initial values, sharding, weight decay, the checkpoint weight table and `infinitevl info` are
derived from them (`infinitevl_jax.nn.params.parameters`). A new layer needs no entry anywhere else.
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
    """Properties of a parameter that its first value, the optimiser, checkpoints and sharding need.

    Attributes:
        init: `init(key, shape)` is the initial value (`infinitevl_jax.nn.initializers`).
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
    """Declare a parameter. It has no values yet: `infinitevl_jax.nn.params.initialize` makes them,
    and `functional` binds a model to them.

    Args:
      init: a function at the top of a module, or an instance of a frozen dataclass. Layers with
        equal facts share traces and programs, so it is compared by value.
      torch_shape: None is `shape`, reversed if transposed.
      axes, decay, matmul, torch_name, transposed: see `Facts`.

    Raises:
      ValueError: `init` is a function made for this layer alone, which equals no other.
    """
    if isinstance(init, functools.partial) or "<locals>" in getattr(init, "__qualname__", ""):
        raise ValueError(f"{init} is made anew for each layer: define it at the top of a module")
    if torch_shape is None:
        torch_shape = shape[::-1] if transposed else shape
    facts = Facts(init, tuple(axes), decay, matmul, torch_name, tuple(torch_shape), transposed)
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), facts=facts)


def stacked(params: Any, *layers: int) -> Any:
    """Parameters without values, with leading axes over layers."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct((*layers, *p.shape), p.dtype), params)
