"""The interface of initialisations, and their registry by name."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from infinitevl_jax.config.model import FULL, SLIDING, ModelConfig
from infinitevl_jax.config.student import InitialiseConfig
from infinitevl_jax.config.variants import register_variant
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import Params, parameters
from infinitevl_jax.nn.stack import Scanned
from infinitevl_jax.sharding import parameter_shardings

MIXER = "self_attn"


@dataclass(frozen=True)
class Setting:
    """What an initialisation starts from.

    Attributes:
      source, source_params: the attention model, stacked.
      student, params: the student; its new mixers have random values, all else is copied.
      stacked: layout of both.
      batches: opens the stage's own data.
      seed: of random values.
    """

    source: ModelConfig
    source_params: Params
    student: ModelConfig
    params: Params
    stacked: Scanned
    mesh: Mesh
    batches: Callable[[], Iterator[TrainBatch]]
    seed: int

    def replace(self, layer: str, values: Mapping[int, np.ndarray]) -> Params:
        """Parameters of mixers as arrays on the mesh, in the student's layout.

        Args:
          layer: name in the mixer, such as "q_proj.kernel".
          values: by number of the layer.
        """
        known = parameters(self.student, scanned=self.stacked)
        places = parameter_shardings(known, self.mesh)
        names = {f"layers.{i}.{MIXER}.{layer}": value for i, value in values.items()}
        out = {}
        for name, parameter in known.items():
            if parameter.layers[0] in names:
                parts = [names[each] for each in parameter.layers]
                value = np.stack(parts) if parameter.stacked else parts[0]
                assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
                value = np.asarray(value, parameter.dtype)
                out[name] = jax.make_array_from_callback(
                    value.shape, places[name], lambda index, value=value: value[index]
                )
        return out


def new_layers(config: ModelConfig) -> list[int]:
    """Layers of a derived student whose mixers are not copied."""
    return [i for i, kind in enumerate(config.text.layer_types) if kind not in (FULL, SLIDING)]


def is_new(config: ModelConfig, layer: str) -> bool:
    """Whether a parameter, by its layer-by-layer name, belongs to a new mixer."""
    stack, number, *rest = (*layer.split(".", 3), "", "")
    return stack == "layers" and rest[0] == MIXER and int(number) in new_layers(config)


_INITIALISERS: dict[str, Callable[[Setting, Any], Mapping[str, Array]]] = {}


def register_initialiser(
    name: str,
    function: Callable[[Setting, Any], Mapping[str, Array]],
    options: type[InitialiseConfig] = InitialiseConfig,
) -> None:
    """Let presets name an initialisation. Its options are the other keys of its table.

    Args:
      function: returns new values of parameters of the student, by stacked name.

    Raises:
      InfiniteVLError: the name is registered with another function.
    """
    if _INITIALISERS.setdefault(name, function) is not function:
        raise InfiniteVLError(f"{name!r} is registered already", "choose another name")
    register_variant(InitialiseConfig, name, options)


def initialise(setting: Setting, options: InitialiseConfig) -> Params:
    """The student's parameters as `options` says."""
    return {**setting.params, **_INITIALISERS[options.name](setting, options)}
