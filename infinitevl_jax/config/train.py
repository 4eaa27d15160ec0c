"""What is trained, on what, and for how long."""

import re
from dataclasses import dataclass, field

from infinitevl_jax.errors import InfiniteVLError


@dataclass(frozen=True)
class DataConfig:
    """Which rows, and how they become batches of one shape.

    name: a tfds builder of `infinitevl_jax.data` ("easy_vqa"). folder: where prepared data sets live.
    train, held_out: splits in tfds' notation; the held-out one only measures, "" for none.
    batch: images of a global batch. questions: questions asked of each (a fresh choice every epoch); an image is encoded once and each
    question goes on from it on a branch of its own. With questions = 0, whole conversations are packed into `batch` rows instead.
    balance: 0 draws questions evenly, 1 so that every question with each of its answers comes up as often ("is there a circle?" yes and
    no alike), as far as the rows have them; in between, (count of the two together) ^ -balance. Where hardly a question comes twice, it
    does nothing.
    opening: for the first `opening_steps` steps, a row that has questions which this regular expression finds is asked those alone.
    prefix_length, length: tokens of an image's prefix and of a question's branch (with questions = 0, length is that of a packed row).
    patches: with questions = 0, patches that the images of one row have room for.
    """

    name: str = "easy_vqa"
    folder: str = "data"
    train: str = "train[:90%]"
    held_out: str = "train[90%:]"
    batch: int = 16
    questions: int = 8
    balance: float = 0.0
    opening: str = ""
    opening_steps: int = 0
    prefix_length: int = 32
    length: int = 32
    patches: int = 0

    def __post_init__(self):
        _at_least("data", self, batch=1, questions=0, balance=0, opening_steps=0, prefix_length=0, length=2, patches=0)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW under a cosine with linear warm-up. No decay on norms, biases, A_log and dt_bias.

    warmup: fraction of the steps. final: learning rate at the end, as a fraction of the peak. clip: largest norm of the gradient.
    """

    peak_lr: float = 5e-5
    warmup: float = 0.05
    final: float = 0.0
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0

    def __post_init__(self):
        for name, low, high in (
            ("peak_lr", 0, None),
            ("warmup", 0, 1),
            ("final", 0, 1),
            ("weight_decay", 0, None),
            ("beta1", 0, 1),
            ("beta2", 0, 1),
            ("clip", 0, None),
        ):
            value = getattr(self, name)
            if not (value >= low and (high is None or value <= high)):
                raise InfiniteVLError(
                    f"train.optimizer.{name} is {value}", f"give {low} or more" + ("" if high is None else f", at most {high}")
                )
        if self.peak_lr == 0 or self.clip == 0:
            raise InfiniteVLError("train.optimizer.peak_lr or clip is 0", "nothing would train: give a positive number")


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training.

    output: folder of the run; checkpoints, log and plot go there, and a run that finds its own checkpoints there goes on from the last.
    steps: how many, or 0 to count by epochs. epochs: passes over the training split.
    trainable: regular expressions; a parameter trains if one of them matches its dotted name whole.
    log_every, checkpoint_every, evaluate_every: in steps; 0 means only at the end. keep: newest checkpoints kept on disk.
    """

    output: str = "runs/train"
    seed: int = 0
    steps: int = 0
    epochs: float = 1.0
    trainable: tuple[str, ...] = (".*",)
    log_every: int = 10
    checkpoint_every: int = 0
    evaluate_every: int = 0
    keep: int = 2
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self):
        object.__setattr__(self, "trainable", tuple(self.trainable))
        _at_least("", self, steps=0, log_every=0, checkpoint_every=0, evaluate_every=0, keep=1)
        if self.steps == 0 and not self.epochs > 0:
            raise InfiniteVLError("train.steps is 0 and train.epochs not positive", "say how long to train with one of them")
        for key, patterns in (("trainable", self.trainable), ("data.opening", [self.data.opening])):
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise InfiniteVLError(f"train.{key}: {pattern!r} is no regular expression: {error}", "escape it, or mend it") from error


def _at_least(section: str, config, **least: int) -> None:
    for name, low in least.items():
        if getattr(config, name) < low:
            where = f"train.{section}.{name}" if section else f"train.{name}"
            raise InfiniteVLError(f"{where} is {getattr(config, name)}", f"give {low} or more")
