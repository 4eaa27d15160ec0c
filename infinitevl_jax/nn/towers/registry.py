"""Vision configuration -> tower. A new tower registers itself here, in one file of its own."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.rngs import Rngs

_TOWERS: dict[type, Callable[..., nnx.Module]] = {}


def register_tower(config: type, make: Callable[..., nnx.Module]) -> None:
    """Let models whose `ModelConfig.vision` is of type `config` use the tower that `make` makes.

    The tower is called as `tower(patches, dtype)` -> [rows, tokens, decoder width].
    """
    _TOWERS[config] = make


def make_tower(config: Any, ops: Ops, *, scanned: bool, remat: Callable, rngs: Rngs) -> nnx.Module:
    """A fresh tower for a vision configuration."""
    return _TOWERS[type(config)](config, ops, scanned=scanned, remat=remat, rngs=rngs)
