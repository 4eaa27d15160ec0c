"""Which questions of a row are asked: options of sources whose rows are questions about images."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from infinitevl_jax.config.ranges import check_patterns
from infinitevl_jax.data.conversation import Conversation, as_turns


class Curriculum(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """How questions are drawn, with `train.data.questions` of them for each image.

    Attributes:
      opening: for the first `opening_steps` steps ask only questions that match this regular
        expression. Rows without a match keep all their questions.
      balance: weight of a question-answer pair is (its count) ^ -balance. 0 draws questions
        uniformly; 1 draws the answers of a question equally often.
    """

    opening: Annotated[str, Meta(max_length=4096)] = ""
    opening_steps: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    balance: Annotated[float, Meta(ge=0, le=10)] = 0.0

    def __post_init__(self):
        check_patterns([self.opening], "train.data.options.opening")


class Drawing:
    """Draws questions of a source's rows, without replacement unless there are too few."""

    def __init__(self, curriculum: Curriculum, rows: Iterable[Conversation]):
        """rows: all of the source, read if questions are balanced."""
        self.opening_steps = curriculum.opening_steps
        self.opening = re.compile(curriculum.opening) if curriculum.opening else None
        self.weights: dict[tuple[str, str], float] = {}
        if curriculum.balance:
            counts = Counter(
                turn
                for row in rows
                for turns in [as_turns(row)]
                for turn in zip(turns.questions, turns.answers, strict=True)
            )
            self.weights = {turn: count**-curriculum.balance for turn, count in counts.items()}

    def draw(
        self, turns: Sequence[tuple[str, str]], count: int, step: int, seed: Sequence[int]
    ) -> list[int]:
        """Numbers of `count` of a row's questions.

        Args:
          turns: its questions with their answers.
          step: of the run.
          seed: of this row in this run.
        """
        rng = np.random.default_rng(list(seed))
        candidates = list(range(len(turns)))
        if self.opening and step < self.opening_steps:
            candidates = [i for i in candidates if self.opening.search(turns[i][0])] or candidates
        chance = np.array([self.weights.get(turns[i], 1.0) for i in candidates])
        order = rng.choice(candidates, len(candidates), replace=False, p=chance / chance.sum())
        return [int(order[i % len(order)]) for i in range(count)]
