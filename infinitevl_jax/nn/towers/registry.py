"""Registry of vision towers by type of their configuration."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.ops import Ops

_TOWERS: dict[type, Callable[..., nnx.Module]] = {}


def register_tower(config: type, make: Callable[..., nnx.Module]) -> None:
    """Register the vision tower of a configuration type.

    Args:
      config: type of `ModelConfig.vision`.
      make: creates the tower: `tower(patches, dtype)` -> [rows, tokens, decoder width].
    """
    _TOWERS[config] = make


def make_tower(config: Any, ops: Ops, *, scanned: bool, remat: Callable) -> nnx.Module:
    """Create the tower of a vision configuration.

    Raises InfiniteVLError where none is registered for its type.
    """
    if type(config) not in _TOWERS:
        raise InfiniteVLError(
            f"no vision tower is registered for {type(config).__name__}",
            "call infinitevl_jax.nn.towers.register_tower with it",
        )
    return _TOWERS[type(config)](config, ops, scanned=scanned, remat=remat)
