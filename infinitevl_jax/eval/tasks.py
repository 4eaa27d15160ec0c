"""Exact answers by task: each question alone after its pictures, beside a blind baseline."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.data.conversation import Turns, as_turns
from infinitevl_jax.data.mixture import Mixture, open_mixture
from infinitevl_jax.eval.vqa import Score, answer_blind, score
from infinitevl_jax.inputs.batch import TokenSequence, join_sequences
from infinitevl_jax.inputs.patches import bucket
from infinitevl_jax.processing import Processor, load_image
from infinitevl_jax.serve.infinitevl import InfiniteVL
from infinitevl_jax.serve.sampling import Sampling

PIXELS = 1 << 23  # of the pictures of one call
Asked = tuple[Turns, int]  # a row and the number of its question


@dataclass(frozen=True)
class Task:
    """Rows of a task.

    Attributes:
      rows: whose questions are asked.
      known: rows of the training split, which the blind baseline learns by heart.
    """

    rows: list[Turns]
    known: list[Turns]


@dataclass(frozen=True)
class Result:
    """What a model answers.

    Attributes:
      tokens: of a prompt, in the mean.
      answers: to the questions of each row.
    """

    score: Score
    blind: Score
    tokens: float
    answers: list[list[str]]

    def as_json(self) -> dict[str, Any]:
        """Figures for a file."""
        found = self.score
        return {
            "questions": found.questions,
            "accuracy": found.all,
            "accuracy_not_yes_no": found.other,
            "blind_accuracy": self.blind.all,
            "blind_accuracy_not_yes_no": self.blind.other,
            "tokens": round(self.tokens, 1),
        }


def open_tasks(data: DataConfig, known: int = 2000) -> dict[str, Task]:
    """The sources of a mixture that have held-out rows, as tasks by name.

    known: rows of the training split that the blind baseline sees, at most.

    Raises:
      InfiniteVLError: there are none, or a row is not pictures with questions and answers.
    """
    held_out = open_mixture(data, held_out=True)
    train = open_mixture(data)
    return {
        name: Task(
            [as_turns(row) for row in Mixture({name: source}).readable()],
            [
                as_turns(row)
                for row in Mixture({name: train.sources[name]}).sample(known).readable()
            ],
        )
        for name, source in held_out.sources.items()
    }


def evaluate(
    model: InfiniteVL,
    processor: Processor,
    tasks: Mapping[str, Task],
    *,
    batch: int = 64,
    max_new_tokens: int = 32,
    progress: Callable[[Iterable, str], Iterable] = lambda groups, name: groups,
) -> dict[str, Result]:
    """Answer all questions of all tasks greedily.

    Args:
      batch: prompts of a call; fewer of large ones.
      progress: wraps the calls of a task by its name, to show how far they are.
    """
    results = {}
    for name, task in tasks.items():
        asked = [(row, i) for row in task.rows for i in range(len(row.questions))]
        texts, tokens = answer_alone(
            model,
            processor,
            asked,
            batch=batch,
            max_new_tokens=max_new_tokens,
            progress=lambda groups, name=name: progress(groups, name),
        )
        left = iter(texts)
        answers = [[next(left) for _ in row.questions] for row in task.rows]
        mine = score(task.rows, answers)
        blind = score(task.rows, answer_blind(task.known, task.rows))
        results[name] = Result(mine, blind, tokens, answers)
    return results


def answer_alone(
    model: InfiniteVL,
    processor: Processor,
    asked: Sequence[Asked],
    *,
    batch: int = 64,
    max_new_tokens: int = 32,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[list[str], float]:
    """Answers in the order of `asked`, and the mean number of tokens of a prompt.

    Prompts of similar size share a call. Its rows and its length are rounded up, so that few shapes
    are compiled.
    """
    answers, tokens = [""] * len(asked), 0
    for group, rows in progress(_groups(asked, batch)):
        prompts = [_prompt(processor, *asked[i]) for i in group]
        lengths = [len(prompt.tokens) for prompt in prompts]
        tokens += sum(lengths)
        spare = [prompts[0]] * (rows - len(prompts))
        joined = join_sequences([*prompts, *spare], rows, bucket(max(lengths)))
        made = model.generate(**joined, max_new_tokens=max_new_tokens, sampling=Sampling())
        for i, text in zip(group, processor.batch_decode(made[: len(group)]), strict=True):
            answers[i] = text.strip()
    return answers, tokens / max(len(asked), 1)


def _groups(asked: Sequence[Asked], batch: int) -> list[tuple[list[int], int]]:
    """Numbers of the questions of each call, and its rows."""
    sizes = [_pixels(row) + len(row.questions[i]) for row, i in asked]
    order = sorted(range(len(asked)), key=sizes.__getitem__)
    groups = []
    while order:
        rows = batch
        while rows > 1 and rows * sizes[order[:rows][-1]] > PIXELS:
            rows = (rows + 1) // 2
        groups.append((order[:rows], rows))
        order = order[rows:]
    return groups


def _pixels(row: Turns) -> int:
    sizes = [load_image(picture["image"]).size for picture in row.pictures]
    return int(sum(np.prod(size) for size in sizes))


def _prompt(processor: Processor, row: Turns, number: int) -> TokenSequence:
    content = [*row.pictures, {"type": "text", "text": row.questions[number]}]
    batch = processor([{"role": "user", "content": content}])
    vision = batch.get("pixel_values"), batch.get("image_grid_thw")
    return TokenSequence(batch["input_ids"][0], *vision)
