"""A model family, and the registry of families by `model_type`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.config_file import ConfigFile


@dataclass(frozen=True)
class TransformersCode:
    """Modules that an exported folder brings along, so that transformers opens it with
    trust_remote_code=True.

    Attributes:
      package: the package that holds them, by its dotted name.
      auto_map: as in config.json: an auto class of transformers -> "module.Class".
    """

    package: str
    auto_map: Mapping[str, str]

    @property
    def modules(self) -> list[str]:
        """Names of the modules that `auto_map` refers to."""
        return sorted({value.partition(".")[0] for value in self.auto_map.values()})


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family are written. The model itself is data: a ModelConfig.

    Attributes:
      name: `model_type` in config.json, and `ModelConfig.family`.
      read: config.json -> ModelConfig. Raises InfiniteVLError for a missing key, and for a key that
        changes the maths in a way that the model does not compute.
      write: ModelConfig -> config.json, which `read` reads back to an equal ModelConfig. Raises
        InfiniteVLError for a setting that the family cannot express.
      tensor_names: (regular expression, replacement), as of `re.sub`. All are applied in order to
        our path of a tensor ("layers.3.mlp.up_proj.weight") and give its name on disk.
      missing_head_is_tied: a checkpoint without lm_head shares the token table, whatever its
        config.json says.
      transformers_code: None where transformers knows the model itself.
    """

    name: str
    read: Callable[[ConfigFile], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    tensor_names: tuple[tuple[str, str], ...]
    missing_head_is_tied: bool = False
    transformers_code: TransformersCode | None = None

    def tensor_name(self, path: str) -> str:
        """The name on disk, as on the hub, of the tensor at our path."""
        for pattern, replacement in self.tensor_names:
            path = re.sub(pattern, replacement, path)
        return path


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Let checkpoints whose config.json has the family's `model_type` be read and written.

    Raises InfiniteVLError if the name is taken by another family.
    """
    if _FAMILIES.setdefault(family.name, family) != family:
        raise InfiniteVLError(
            f"the family {family.name!r} is registered already", "choose another name"
        )


def family(name: str) -> Family:
    """The registered family of that name; InfiniteVLError where there is none."""
    if name not in _FAMILIES:
        raise InfiniteVLError(
            f"the family {name!r} is not registered", f"choose one of {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[name]


def family_names() -> tuple[str, ...]:
    """Names of the registered families, in the order of their registration."""
    return tuple(_FAMILIES)
