"""Initial values of parameters.

An initialiser is called as `init(key, shape)` and returns float32. Each parameter names its own
where it is declared (`infinitevl_jax.nn.parameter`). The key of a parameter comes from the run's
key and its layer-by-layer name, so that its values depend neither on the layout or the mesh nor on
the parameters beside it.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from infinitevl_jax.nn.params import Parameter

Initializer = Callable[[Array, tuple[int, ...]], Array]

zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


@dataclass(frozen=True)
class Normal:
    """N(0, std^2)."""

    std: float

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Array:
        return self.std * jax.random.normal(key, shape)


def fan_in(key: Array, shape: tuple[int, ...]) -> Array:
    """U(+-1/sqrt(in)) for a matrix [in, out]."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def draw(
    parameters: "Mapping[str, Parameter]",
    key: Array,
    *,
    dtype=jnp.float32,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> dict[str, Array]:
    """Initial values of parameters in any layout.

    Parameters of one shape and initialiser share a program, also those of other models. The layers
    of a stack are drawn one by one: not every generator gives the same values under `jax.vmap`.

    Args:
      key: a typed key of any generator.
      shardings: by name; each device creates its own shards.
    """
    out = {}
    for name, parameter in parameters.items():
        place = None if shardings is None else shardings[name]
        shape, each = parameter.shape, place
        if parameter.stacked:
            shape = shape[1:]
            each = place and NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
        drawn = _drawing(parameter.facts.init, shape, jnp.dtype(dtype), each)
        values = [drawn(_fold(key, np.uint32(zlib.crc32(n.encode())))) for n in parameter.layers]
        value = _stacking(place)(values) if parameter.stacked else values[0]
        # Programs that wait to run would hold their memory already.
        out[name] = jax.block_until_ready(value)
    return out


_fold = jax.jit(jax.random.fold_in)


@cache
def _drawing(
    init: Initializer, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None
) -> Callable[[Array], Array]:
    """The program that draws a parameter of one layer."""

    def draw_one(key: Array) -> Array:
        value = init(key, shape)
        if value.shape != shape:
            raise ValueError(f"{init} gives the shape {value.shape} for {shape}")
        return value.astype(dtype)

    return jax.jit(draw_one, out_shardings=sharding)


@cache
def _stacking(sharding: NamedSharding | None) -> Callable[[list[Array]], Array]:
    """The program that stacks the layers of a block."""
    return jax.jit(jnp.stack, out_shardings=sharding)
