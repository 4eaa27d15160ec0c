"""Arrays from host memory onto devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

Index = tuple[slice, ...] | None


def place(
    shape: tuple[int, ...],
    sharding: Sharding | None,
    read: Callable[[Index], np.ndarray],
    *,
    whole: bool = False,
) -> jax.Array:
    """An array that is laid out as asked, read part by part.

    Args:
      sharding: None for the default device.
      read: array[index], or all of it for None. Each process reads the parts of its own devices,
        and replicas of a part once.
      whole: read all at once where this process has all parts.
    """
    if sharding is None:
        return jnp.asarray(read(None))
    parts: dict[str, np.ndarray] = {}
    value = read(None) if whole and sharding.is_fully_addressable else None

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if value is not None:
            return value[index]
        if str(index) not in parts:
            parts[str(index)] = read(index)
        return parts[str(index)]

    return jax.make_array_from_callback(shape, sharding, part)
