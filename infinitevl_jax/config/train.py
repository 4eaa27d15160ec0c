"""What is trained, on what, and for how long."""

import re
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta

from infinitevl_jax.config.ranges import (
    INT32,
    Count,
    Folder,
    Name,
    Positive,
    Seed,
    Share,
    check_ranges,
)
from infinitevl_jax.errors import InfiniteVLError

TOKENS = 2**26  # of a batch: its arrays take 1 GB
PATCHES = 2**21  # of a batch: they take 10 GB where a patch has 1,176 numbers


@dataclass(frozen=True)
class DataConfig:
    """Which rows, and how they become batches of one shape.

    name: a tfds builder of `infinitevl_jax.data` ("easy_vqa"). folder: where prepared data sets
      live.
    train, held_out: splits in tfds' notation; the held-out one only measures, "" for none.
    batch: images of a global batch. questions: questions asked of each (a fresh choice every
      epoch); an image is encoded once and each
    question goes on from it on a branch of its own. With questions = 0, whole conversations are
    packed into `batch` rows instead.
    balance: 0 draws questions evenly, 1 so that every question with each of its answers comes up as
      often ("is there a circle?" yes and
    no alike), as far as the rows have them; in between, (count of the two together) ^ -balance.
    Where hardly a question comes twice, it does nothing.
    opening: for the first `opening_steps` steps, a row that has questions which this regular
      expression finds is asked those alone.
    prefix_length, length: tokens of an image's prefix and of a question's branch (with questions =
      0, length is that of a packed row).
    patches: with questions = 0, patches that the images of one row have room for.
    max_skipped: the share of a split's rows that may be unusable (a damaged picture, too long for a
      batch): they are named and skipped.
    One more ends the run. A few (`infinitevl_jax.data.skipping`) always may, unless this is 0.
    """

    name: Name = "easy_vqa"
    folder: Folder = "data"
    train: Name = "train[:90%]"
    held_out: Name = "train[90%:]"
    batch: Annotated[int, Meta(ge=1, le=2**20)] = 16
    questions: Annotated[int, Meta(ge=0, le=2**16)] = 8
    balance: Annotated[float, Meta(ge=0, le=10)] = 0.0
    opening: Name = ""
    opening_steps: Count = 0
    prefix_length: Annotated[int, Meta(ge=0, le=2**24)] = 32
    length: Annotated[int, Meta(ge=2, le=2**24)] = 32
    patches: Annotated[int, Meta(ge=0, le=2**24)] = 0
    max_skipped: Share = 0.01

    def __post_init__(self):
        check_ranges(self)
        rows = max(self.questions, 1)
        for what, size, limit in (
            (
                "tokens (batch x (questions x length + prefix_length))",
                rows * self.length + self.prefix_length,
                TOKENS,
            ),
            ("patches (batch x patches)", self.patches, PATCHES),
        ):
            if self.batch * size > limit:
                raise InfiniteVLError(
                    f"train.data: a batch of {self.batch * size:,} {what}, at most {limit:,} fit",
                    "make one of them smaller",
                )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a cosine with linear warm-up. No decay on norms, biases, A_log and dt_bias.

    warmup: fraction of the steps. final: learning rate at the end, as a fraction of the peak. clip:
      largest norm of the gradient.
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

    output: folder of the run; checkpoints, log and plot go there, and a run that finds its own
      checkpoints there goes on from the last.
    steps: how many, or 0 to count by epochs. epochs: passes over the training split.
    trainable: regular expressions; a parameter trains if one of them matches its dotted name whole.
    log_every, evaluate_every: in steps; 0 means only at the end.
    checkpoint_every: in steps, 0 for none. checkpoint_minutes: minutes of training between
      checkpoints, 0 for none. Both may be given.
    Beside these a run saves before it measures on held-out data, and before it ends, also on an
    error.
    keep: newest checkpoints kept on disk.
    """

    output: Folder = "runs/train"
    seed: Seed = 0
    steps: Count = 0
    epochs: Annotated[float, Meta(ge=0, le=1e9)] = 1.0
    trainable: tuple[Name, ...] = (".*",)
    log_every: Count = 10
    checkpoint_every: Count = 0
    checkpoint_minutes: Annotated[float, Meta(ge=0, le=INT32)] = 30.0
    evaluate_every: Count = 0
    keep: Positive = 2
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self):
        object.__setattr__(self, "trainable", tuple(self.trainable))
        check_ranges(self)
        if self.steps == 0 and not self.epochs > 0:
            raise InfiniteVLError(
                "train.steps is 0 and train.epochs not positive",
                "say how long to train with one of them",
            )
        for key, patterns in (("trainable", self.trainable), ("data.opening", [self.data.opening])):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except (re.error, RecursionError, OverflowError) as error:
                    raise InfiniteVLError(
                        f"train.{key}: {pattern!r} is no regular expression: {error}",
                        "escape it, or mend it",
                    ) from error
