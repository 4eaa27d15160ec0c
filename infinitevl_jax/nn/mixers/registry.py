"""Layer type -> mixer. A new mixer registers itself here, in one file of its own."""

from collections.abc import Callable
from dataclasses import dataclass

from infinitevl_jax.config.model import LAYER_TYPES, TextConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.mixers.mixer import Mixer
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.rngs import Rngs


@dataclass(frozen=True)
class LayerType:
    """A kind of decoder layer.

    Attributes:
      name: as in `TextConfig.layer_types` and config.json.
      make: makes the mixer.
      title: for people, of the layer. group: of its mixer's parameters.
    """

    name: str
    make: Callable[[TextConfig, Ops, Rngs], Mixer]
    title: str
    group: str


_TYPES: dict[str, LayerType] = {}


def register_mixer(
    name: str,
    make: Callable[[TextConfig, Ops, Rngs], Mixer],
    *,
    title: str | None = None,
    group: str | None = None,
) -> None:
    """Let layers of type `name` use the mixer that `make` makes.

    Raises InfiniteVLError if the name is taken by another.
    """
    if name in _TYPES and _TYPES[name].make is not make:
        raise InfiniteVLError(f"layer type {name!r} is registered already", "choose another name")
    title = title or name
    _TYPES[name] = LayerType(name, make, title, group or f"{title} mixers")
    LAYER_TYPES.add(name)


def layer_type(name: str) -> LayerType:
    """The registered layer type of that name; `TextConfig` knows no other names."""
    return _TYPES[name]
