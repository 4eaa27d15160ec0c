"""The interface of objectives, and their registry by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.objective import ObjectiveConfig
from infinitevl_jax.config.variants import register_variant
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.vlm import VLM

# A model with its parameters. A call casts the parameters to the activation dtype: gradients of two
# passes add in float32 if each pass has a call of its own.
Model = Callable[[], VLM]
Models = Mapping[str, Model]

STUDENT, TEACHER = "student", "teacher"


class Mean(NamedTuple):
    """A mean over tokens as two sums, which add up over batches, both [] float32."""

    total: Array
    weight: Array

    @property
    def value(self) -> Array:
        """The mean; 0 of no tokens."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1)


class Measured(NamedTuple):
    """What an objective finds in a batch.

    Attributes:
      loss: its terms; the loss is the sum of their means.
      logged: means by name for the log and the bar.
    """

    loss: tuple[Mean, ...]
    logged: dict[str, Mean]

    @property
    def value(self) -> Array:
        """The loss, []."""
        return sum(term.value for term in self.loss)


@dataclass(frozen=True)
class Objective:
    """A registered objective.

    Attributes:
      name: in [train.objective].
      function: maps models by name, a batch and options to `Measured`. It is traced; the gradient
        is taken with respect to the student's trained parameters.
      models: names of the models that it reads; "student" is the one that trains.
      check: raises InfiniteVLError if the models, by name, do not suit.
      reached: whether its gradient reaches a parameter of the student, by its layer-by-layer name.
        Others must not train: weight decay alone would change them.
    """

    name: str
    function: Callable[[Models, TrainBatch, Any], Measured]
    models: tuple[str, ...]
    check: Callable[[Mapping[str, ModelConfig], Any], None]
    reached: Callable[[str, ModelConfig, Any], bool]


_OBJECTIVES: dict[str, Objective] = {}


def register_objective(
    name: str,
    function: Callable[[Models, TrainBatch, Any], Measured],
    *,
    options: type[ObjectiveConfig] = ObjectiveConfig,
    models: tuple[str, ...] = (STUDENT,),
    check: Callable[[Mapping[str, ModelConfig], Any], None] = lambda configs, options: None,
    reached: Callable[[str, ModelConfig, Any], bool] = lambda name, student, options: True,
) -> None:
    """Let presets name an objective. Its options are the other keys of [train.objective].

    Args:
      options: a frozen dataclass of the options, whose values are checked against their types.
      models, check, reached: see `Objective`.

    Raises:
      InfiniteVLError: the name is registered with another function, or a run has no such model.
    """
    if unknown := set(models) - {STUDENT, TEACHER}:
        raise InfiniteVLError(
            f"objective {name!r} reads the model {min(unknown)!r}",
            f"the models of a run are {STUDENT} and {TEACHER}",
        )
    if name in _OBJECTIVES and _OBJECTIVES[name].function is not function:
        raise InfiniteVLError(f"objective {name!r} is registered already", "choose another name")
    register_variant(ObjectiveConfig, name, options)
    _OBJECTIVES[name] = Objective(name, function, models, check, reached)


def objective(name: str) -> Objective:
    """Look up a registered objective."""
    return _OBJECTIVES[name]
