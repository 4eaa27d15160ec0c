"""Registry of token mixers by layer type."""

from collections.abc import Callable
from dataclasses import dataclass

from infinitevl_jax.config.model import LAYER_TYPES, TextConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.mixers.mixer import Mixer
from infinitevl_jax.nn.ops import Ops


@dataclass(frozen=True)
class LayerType:
    """A kind of decoder layer.

    Attributes:
      name: as in `TextConfig.layer_types` and config.json.
      make: creates the mixer.
      title: display name of the layer.
      group: display name of the mixer's parameters.
    """

    name: str
    make: Callable[[TextConfig, Ops], Mixer]
    title: str
    group: str


_TYPES: dict[str, LayerType] = {}


def register_mixer(
    name: str,
    make: Callable[[TextConfig, Ops], Mixer],
    *,
    title: str | None = None,
    group: str | None = None,
) -> None:
    """Register the mixer of a layer type.

    Args:
      make: creates the mixer.
      title, group: see `LayerType`.

    Raises:
      InfiniteVLError: the name is registered with another mixer.
    """
    if name in _TYPES and _TYPES[name].make is not make:
        raise InfiniteVLError(f"layer type {name!r} is registered already", "choose another name")
    title = title or name
    _TYPES[name] = LayerType(name, make, title, group or f"{title} mixers")
    LAYER_TYPES.add(name)


def layer_type(name: str) -> LayerType:
    """Look up a registered layer type. `TextConfig` accepts no other names."""
    return _TYPES[name]
