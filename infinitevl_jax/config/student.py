"""Distillation: the teacher, and how a student is derived from an attention model."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from infinitevl_jax.config.model import LAYER_TYPES, LINEAR, ModelConfig, TextConfig
from infinitevl_jax.config.ranges import (
    INT32,
    LAYERS,
    Count,
    Folder,
    Heads,
    Name,
    Positive,
    Share,
    Width,
    check_ranges,
)
from infinitevl_jax.config.run import Dtype
from infinitevl_jax.config.variants import check_name, register_variant
from infinitevl_jax.errors import InfiniteVLError


@dataclass(frozen=True)
class TeacherConfig:
    """The model whose outputs are the target. It is frozen and in no checkpoint of the run.

    Attributes:
      from_: "from" in the file; a checkpoint folder of this project or of Hugging Face, or a run's
        folder, for its newest checkpoint.
      dtype: activation dtype; None is that of the run.
      parameters: dtype of its parameters; None keeps each tensor's own. What equals a frozen
        parameter of the student is in memory once.
      placement: "sharded" as the student's, or "replicated": whole on every device.
    """

    from_: Folder
    dtype: Dtype | None = None
    parameters: Dtype | None = None
    placement: Literal["sharded", "replicated"] = "sharded"

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class InitialiseConfig:
    """How the mixers of a derived student start. `name` chooses the way."""

    name: Name = "attention"

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class PaperConfig(InitialiseConfig):
    """As the paper's authors do: nothing is copied into Gated DeltaNet mixers."""

    name: Name = "paper"


@dataclass(frozen=True)
class AttentionConfig(InitialiseConfig):
    """From the attention that a Gated DeltaNet mixer replaces.

    Attributes:
      tokens: of the stage's own data to measure and fit on.
      shortest, longest: limits of a head's half-life in tokens.
      ridge: of the output projection, as a share of the mean diagonal of the normal equations.
    """

    name: Name = "attention"
    tokens: Positive = 262_144
    shortest: Annotated[float, Meta(gt=0, le=1e6)] = 2.0
    longest: Annotated[float, Meta(gt=0, le=1e6)] = 512.0
    ridge: Annotated[float, Meta(gt=0, le=1e6)] = 0.1

    def __post_init__(self):
        super().__post_init__()
        if self.shortest > self.longest:
            raise InfiniteVLError(
                f"model.mixers.initialise: shortest {self.shortest:g} is above longest"
                f" {self.longest:g}",
                "exchange them",
            )


for _options in (PaperConfig, AttentionConfig):
    register_variant(InitialiseConfig, _options.name, _options)


@dataclass(frozen=True)
class MixersConfig:
    """Mixers that replace those of an attention model; all else is copied.

    Attributes:
      layer_types: types of the first layers, repeated to the model's depth.
      sliding_window, num_attention_sinks: None keeps the model's.
      num_linear_heads: of Gated DeltaNet; None is one for each query head.
      linear_head_dim: None is the width of an attention head. Wider keys are filled with zeros.
      expand_v, norm_eps: of Gated DeltaNet.
      initialise: how Gated DeltaNet mixers start.
    """

    layer_types: Annotated[tuple[str, ...], Meta(min_length=1, max_length=LAYERS)]
    sliding_window: Annotated[int, Meta(ge=1, le=INT32)] | None = None
    num_attention_sinks: Count | None = None
    num_linear_heads: Heads | None = None
    linear_head_dim: Width | None = None
    expand_v: Annotated[float, Meta(gt=0, le=64)] = TextConfig.expand_v
    norm_eps: Share = TextConfig.norm_eps
    initialise: InitialiseConfig = field(default_factory=AttentionConfig)

    def __post_init__(self):
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        check_ranges(self)
        check_name(InitialiseConfig, self.initialise, "model.mixers.initialise")
        if unknown := sorted(set(self.layer_types) - LAYER_TYPES):
            raise InfiniteVLError(
                f"model.mixers.layer_types holds {unknown[0]!r}",
                f"every layer is one of {', '.join(sorted(LAYER_TYPES))}",
            )


def derive(model: ModelConfig, mixers: MixersConfig) -> ModelConfig:
    """Configuration of the student: `model` with other mixers, as a model of this project's family.

    Raises:
      InfiniteVLError: `model` is no attention model.
    """
    text = model.text
    if LINEAR in text.layer_types:
        raise InfiniteVLError(
            f"model.mixers replaces attention, but the model of model.from has {LINEAR} layers",
            "name an attention model in model.from, or leave model.mixers out",
        )
    depth, pattern = text.num_hidden_layers, mixers.layer_types
    sinks = mixers.num_attention_sinks
    text = dataclasses.replace(
        text,
        layer_types=tuple(pattern[i % len(pattern)] for i in range(depth)),
        sliding_window=mixers.sliding_window or text.sliding_window,
        num_attention_sinks=text.num_attention_sinks if sinks is None else sinks,
        num_linear_heads=mixers.num_linear_heads or text.num_attention_heads,
        linear_head_dim=mixers.linear_head_dim or text.head_dim,
        expand_v=mixers.expand_v,
        norm_eps=mixers.norm_eps,
    )
    return dataclasses.replace(model, text=text, family=ModelConfig.family)
