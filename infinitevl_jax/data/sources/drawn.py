"""Pictures with questions, drawn while they are read: `train.data.options.task` says which.

Row i of a split depends on task, seed, split and i alone. The rows of "test" use fonts and words of
which "train" has none.
"""

import random
from typing import Annotated

import msgspec
from msgspec import Meta

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation, turn
from infinitevl_jax.data.drawing.fonts import open_fonts
from infinitevl_jax.data.drawing.scene import Scene, Supplies
from infinitevl_jax.data.drawing.split import TEST, TRAIN
from infinitevl_jax.data.drawing.tasks import TASKS
from infinitevl_jax.data.drawing.words import open_words
from infinitevl_jax.data.sources import Source, register_source
from infinitevl_jax.data.sources.files import options
from infinitevl_jax.data.splits import select_rows
from infinitevl_jax.errors import BadRow, InfiniteVLError

SMALLEST = 96  # pixels of the largest side, in which a receipt can be read


class Options(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What is drawn.

    Attributes:
      task: of `TASKS`.
      rows: of each split.
      seed: of the pictures; another one draws others.
      fonts: a folder of fonts; "" is those of matplotlib (DejaVu and STIX).
      words: a text file, one word a line; "" invents words.
      held_out: share of the font families, and of the words, that only the test split has.
      size: largest side of a picture in pixels.
      frames: with the task "recall": pictures of a conversation, at most.
      ago: with the task "recall": the card asked for was shown so many pictures ago, with nothing
        before it; 0 is any number up to `frames`.
    """

    task: Annotated[str, Meta(min_length=1)]
    rows: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 100_000
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    fonts: str = ""
    words: str = ""
    held_out: Annotated[float, Meta(gt=0, lt=1)] = 0.1
    size: Annotated[int, Meta(ge=SMALLEST, le=1024)] = 192
    frames: Annotated[int, Meta(ge=1, le=1024)] = 16
    ago: Annotated[int, Meta(ge=0, le=1024)] = 0

    def __post_init__(self):
        if self.task not in TASKS:
            raise InfiniteVLError(
                f"train.data.options.task is {self.task!r}", f"tasks: {', '.join(sorted(TASKS))}"
            )
        if self.task != "recall" and (self.ago or self.frames != 16):
            raise InfiniteVLError(
                f"train.data.options gives frames or ago to the task {self.task!r}",
                'only the task "recall" has several pictures: leave them out',
            )


class Drawn:
    """Rows of a split."""

    def __init__(self, config: Options, split: str):
        self.config, self.part = config, TEST if split.startswith(TEST) else TRAIN
        self.title = f"{config.task} {split}"
        self.rows = select_rows(split, config.rows, config.task, self.part)
        fonts = open_fonts(config.fonts, self.part, config.held_out)
        words = open_words(config.words, self.part, config.held_out)
        self.supplies = Supplies(fonts, words, config.size, config.frames, config.ago)

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, number: int) -> int:
        """Number of a row in the whole split."""
        return int(self.rows[range(len(self))[number]])

    def scene(self, number: int) -> Scene:
        """Row `number` as pictures and turns."""
        config, record = self.config, self.record(number)
        rng = random.Random(f"{config.seed} {config.task} {self.part} {record}")
        try:
            return TASKS[config.task](rng, self.supplies)
        except InfiniteVLError as error:
            raise BadRow(self.title, record, error.culprit, error.cure) from error

    def __getitem__(self, number: int) -> Conversation:
        """Row `number`. Questions of every second row begin with a capital."""
        pictures, turns = self.scene(number)
        capital = self.record(number) % 2 == 0
        shown = [{"type": "image", "image": picture} for picture in pictures]
        messages = []
        for question, answer in turns:
            words = question[0].upper() + question[1:] if capital else question
            messages += turn(shown, words, answer)
            shown = []
        return Conversation(messages)


def open_drawn(config: SourceConfig, split: str) -> Source:
    """Open a split, "train" or "test" or a slice of one."""
    return Drawn(options(config, Options), split)


register_source("drawn", open_drawn)
