"""Options of the objectives, the table [train.objective]: `name` chooses one.

The objectives themselves are in `infinitevl_jax.train.objectives`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from infinitevl_jax.config.ranges import Count, Name, Share, check_ranges
from infinitevl_jax.config.variants import register_variant
from infinitevl_jax.errors import InfiniteVLError

Factor = Annotated[float, Meta(ge=0, le=1e9)]


@dataclass(frozen=True)
class ObjectiveConfig:
    """An objective with its options. The base class has none."""

    name: Name = "supervised"

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class SupervisedConfig(ObjectiveConfig):
    """Cross entropy of the answers."""

    name: Name = "supervised"


@dataclass(frozen=True)
class LayerwiseConfig(ObjectiveConfig):
    """Each mixer of the student, fed the teacher's input of its layer, against the teacher's mixer.

    Attributes:
      distance: of two outputs of width d at a token: "norm" is |a - b| / sqrt(d), "mse" its square.
      layers: numbers of the layers to compare; empty is all.
      layer_types: types of the student's layers to compare; empty is all.
      factor: of the loss. AdamW ignores it but for the clipping of gradients.
    """

    name: Name = "layerwise"
    distance: Literal["norm", "mse"] = "norm"
    layers: tuple[Count, ...] = ()
    layer_types: tuple[Name, ...] = ()
    factor: Annotated[float, Meta(gt=0, le=1e9)] = 1.0


@dataclass(frozen=True)
class DistillConfig(ObjectiveConfig):
    """KL divergence of the student's predictions from the teacher's, and cross entropy.

    loss = kl x temperature^2 x mean KL(teacher || student) + cross_entropy x mean cross entropy

    Attributes:
      temperature: divides the logits of both models in the divergence.
      kl: factor of the divergence.
      cross_entropy: factor of the cross entropy of the answers.
      prompt_weight: weight in the divergence of text that is not an answer; answers have 1, so 0
        compares answers only and 1 all text. Image and video tokens never count.
    """

    name: Name = "distill"
    temperature: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    kl: Factor = 1.0
    cross_entropy: Factor = 0.0
    prompt_weight: Share = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.kl == self.cross_entropy == 0:
            raise InfiniteVLError(
                "train.objective: kl and cross_entropy are 0",
                "nothing would train: give one of them a positive factor",
            )


for _options in (SupervisedConfig, LayerwiseConfig, DistillConfig):
    register_variant(ObjectiveConfig, _options.name, _options)
