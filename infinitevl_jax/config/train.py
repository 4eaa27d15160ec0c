"""Training configuration: optimiser, length, checkpoints."""

from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.config.lora import LoraConfig
from infinitevl_jax.config.objective import ObjectiveConfig, SupervisedConfig
from infinitevl_jax.config.ranges import (
    INT32,
    Count,
    Folder,
    Name,
    Positive,
    Seed,
    Share,
    check_patterns,
    check_ranges,
)
from infinitevl_jax.config.variants import check_name
from infinitevl_jax.errors import InfiniteVLError

ADAPTERS = r".*\.lora_[ab]"
LearningRateFactor = Annotated[float, Meta(ge=0, le=1e6)]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay of the learning rate.

    Attributes:
      warmup: fraction of the steps.
      final: final learning rate as a fraction of the peak.
      weight_decay: not applied to norms, biases, A_log and dt_bias.
      clip: largest norm of the gradient.
    """

    peak_lr: Annotated[float, Meta(ge=0, le=1e6)] = 5e-5
    warmup: Share = 0.05
    final: Share = 0.0
    weight_decay: Annotated[float, Meta(ge=0, le=1e6)] = 0.01
    beta1: Share = 0.9
    beta2: Share = 0.999
    clip: Annotated[float, Meta(ge=0, le=1e12)] = 1.0

    def __post_init__(self):
        check_ranges(self)
        if self.peak_lr == 0 or self.clip == 0:
            raise InfiniteVLError(
                "train.optimizer.peak_lr or clip is 0",
                "nothing would train: give a positive number",
            )


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training.

    A run also saves a checkpoint before it evaluates, at its end and on an error.

    Attributes:
      output: folder for checkpoints, log and plot. A run resumes from the checkpoints in it.
      steps: number of steps; 0 uses `epochs`.
      epochs: passes over the training split.
      minutes: the run saves and stops after so long, preparation included, and the same command
        goes on. 0 saves the model as it starts. None is no limit.
      trainable: regular expressions. A parameter trains if one matches its whole dotted name. Or a
        table of regular expression = factor: the first that matches a name decides the factor of
        its learning rate; with 0, or without a match, the parameter is frozen. Not given: all
        parameters, with `lora` its adapters only.
      lora: adapters beside the model's linear layers; None is none.
      objective: what is minimised, chosen by its key `name`, with its options.
      log_every, evaluate_every: in steps; 0 is only at the end.
      checkpoint_every: in steps; 0 is off.
      checkpoint_minutes: minutes of training between checkpoints; 0 is off.
      checkpoint_async: write checkpoints while the run goes on, from a copy of what trains and its
        moments in the host's memory; false writes them part by part while the run waits.
      keep: number of newest checkpoints to keep.
      keep_best: also keep the checkpoint with the lowest held-out loss.
      accumulate: parts in which the global batch is taken, one after the other. The step is the
        same, with the activations of one part.
    """

    output: Folder = "runs/train"
    seed: Seed = 0
    steps: Count = 0
    epochs: Annotated[float, Meta(ge=0, le=1e9)] = 1.0
    minutes: Annotated[float, Meta(ge=0, le=INT32)] | None = None
    trainable: tuple[Name, ...] | dict[Name, LearningRateFactor] | None = None
    log_every: Count = 10
    checkpoint_every: Count = 0
    checkpoint_minutes: Annotated[float, Meta(ge=0, le=INT32)] = 30.0
    checkpoint_async: bool = True
    evaluate_every: Count = 0
    keep: Positive = 2
    keep_best: bool = False
    accumulate: Annotated[int, Meta(ge=1, le=2**16)] = 1
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig | None = None
    objective: ObjectiveConfig = field(default_factory=SupervisedConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self):
        chosen = self.trainable
        if chosen is None:
            chosen = (ADAPTERS if self.lora else ".*",)
        chosen = chosen if isinstance(chosen, dict) else tuple(chosen)
        object.__setattr__(self, "trainable", chosen)
        check_ranges(self)
        check_name(ObjectiveConfig, self.objective, "train.objective")
        if self.keep_best and not any(source.held_out for source in self.data.mixture.values()):
            raise InfiniteVLError(
                "train.keep_best is true, and there is no held-out split to tell which is best",
                "give train.data.held_out, or leave train.keep_best out",
            )
        if self.steps == 0 and not self.epochs > 0:
            raise InfiniteVLError(
                "train.steps is 0 and train.epochs not positive",
                "say how long to train with one of them",
            )
        check_patterns(chosen, "train.trainable")
