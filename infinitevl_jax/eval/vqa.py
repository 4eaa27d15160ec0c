"""Visual question answering: greedy answers, exact-match score, blind baseline."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from infinitevl_jax.data.collate import group_questions
from infinitevl_jax.data.conversation import Turns
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.encoded import EncodedRow
from infinitevl_jax.inputs.batch import join_sequences
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.processing import Processor
from infinitevl_jax.serve.infinitevl import InfiniteVL
from infinitevl_jax.serve.sampling import Sampling

YES_NO = ("yes", "no")


def answer_branches(
    model: InfiniteVL,
    processor: Processor,
    rows: Sequence[EncodedRow],
    questions: Sequence[Sequence[int]],
    *,
    images: int,
    branches: int,
    max_new_tokens: int = 4,
) -> list[str]:
    """Answer questions about images greedily.

    Each image is encoded once. Its questions continue from copies of its cache, so no question sees
    another.

    Args:
      rows: at most `images`. Answers in them are not read.
      questions: indices of the questions of each row; at most `branches` in total.
      images, branches: the batch is padded to these numbers, so that all calls have one shape.

    Returns:
      The answers in the order of the questions.
    """
    prompts = [
        row.branches[i].question for row, which in zip(rows, questions, strict=True) for i in which
    ]
    count, spare = len(prompts), branches - len(prompts)
    parents = np.pad(
        np.repeat(np.arange(len(rows)), [len(which) for which in questions]), (0, spare)
    )
    seen = join_sequences([row.prefix for row in [*rows, *[rows[0]] * (images - len(rows))]])
    asked = join_sequences([*prompts, *[prompts[0]] * spare])
    longest = seen["input_ids"].shape[1] + asked["input_ids"].shape[1] + max_new_tokens
    _, cache = model.prefill(build_inputs(model.config, **seen), model.init_cache(images, longest))
    logits, cache = model.prefill(
        build_inputs(model.config, **asked), cache.select(jnp.asarray(parents))
    )
    answers: list[np.ndarray] = []
    ended = np.zeros(count, bool)
    greedy = {"max_new_tokens": max_new_tokens, "sampling": Sampling()}
    for tokens, _ in model.decode(logits, cache, **greedy):
        answers.append(tokens[:count])
        ended |= np.isin(tokens[:count], model.config.eos_token_ids)
        if ended.all():  # whatever the padding says
            break
    return [text.strip() for text in processor.batch_decode(np.stack(answers, 1))]


def answer_split(
    model: InfiniteVL,
    processor: Processor,
    encoder: Encoder,
    *,
    images: int = 48,
    branches: int = 512,
    progress: Callable[[Iterable], Iterable] = iter,
) -> list[list[str]]:
    """Answer all questions of a split. `images` and `branches` are the sizes of one call.

    Returns:
      A list of answers per row.
    """
    answers: list[list[str]] = []
    groups = list(
        group_questions([len(encoder[i].branches) for i in range(len(encoder))], images, branches)
    )
    for group in progress(groups):
        rows, questions = [encoder[i] for i, _ in group], [which for _, which in group]
        texts = iter(
            answer_branches(model, processor, rows, questions, images=images, branches=branches)
        )
        for number, which in group:
            if number == len(answers):
                answers.append([])
            answers[number] += [next(texts) for _ in which]
    return answers


@dataclass(frozen=True)
class Score:
    """Exact matches of all questions, and of those whose answer is neither yes nor no."""

    right: int
    questions: int
    right_other: int
    questions_other: int

    @property
    def all(self) -> float:
        return self.right / max(self.questions, 1)

    @property
    def other(self) -> float:
        return self.right_other / max(self.questions_other, 1)


def score(rows: Sequence[Turns], answers: Sequence[Sequence[str]]) -> Score:
    """Compare answers with the labels of the rows."""
    pairs = [
        (a, t)
        for row, given in zip(rows, answers, strict=True)
        for a, t in zip(given, row.answers, strict=True)
    ]
    other = [(a, t) for a, t in pairs if t not in YES_NO]
    return Score(
        sum(a == t for a, t in pairs), len(pairs), sum(a == t for a, t in other), len(other)
    )


def answer_blind(train: Sequence[Turns], rows: Sequence[Turns]) -> list[list[str]]:
    """Blind baseline: the most frequent answer to each question in the training split.

    Ties are broken by overall frequency.
    """
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for row in train:
        for question, answer in zip(row.questions, row.answers, strict=True):
            by_question[question][answer] += 1
            overall[answer] += 1
    best = {
        question: max(counts, key=lambda a, counts=counts: (counts[a], overall[a]))
        for question, counts in by_question.items()
    }
    return [
        [best.get(question, overall.most_common(1)[0][0]) for question in row.questions]
        for row in rows
    ]
