"""Training rows: pictures, questions and answers that do not fit, up to the batch."""

import io
import unicodedata
from random import Random
from typing import Any, NamedTuple

import numpy as np
from tiny_folder import IDS, tiny_config

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.pipeline import held_out_batches, train_batches
from infinitevl_jax.data.sources.tfds import Dataset

from ..case import Case, Place
from ..content import ODD_TEXT, mutate_bytes, mutate_text
from . import processors
from .messages import PICTURES, processor
from .processors import prompt_ids

ODD = [
    "",
    " ",
    "\n",
    "<|im_end|>",
    "<|im_start|>user\n",
    "<|image_pad|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "x" * 100_000,
    *ODD_TEXT,
]
ODD += [None, 3, b"bytes", b"\xff\xfe", ["a"], np.str_("x"), np.array(["a"]), {"a": 1}]
QUESTIONS, ANSWERS = ["what color is it?", "is it red?"], ["blue", "no"]


class Row(NamedTuple):
    """A row as it is stored."""

    image: Any
    questions: Any
    answers: Any


class Rows(Dataset):
    """A data set in memory: rows as tfds gives them."""

    def __init__(self, rows: list[dict]):
        self.name, self.split, self._rows = "rows", "train", rows


def png() -> bytes:
    file = io.BytesIO()
    processors.picture().save(file, "PNG")
    return file.getvalue()


def make(rng: Random, place: Place) -> Case:
    rows = [Row(png(), list(QUESTIONS), list(ANSWERS)) for _ in range(4)]
    bad = rng.randrange(4)
    image, questions, answers = rows[bad]
    kind = rng.choice(
        [
            "image",
            "image",
            "text",
            "text",
            "odd",
            "odd",
            "odd",
            "counts",
            "counts",
            "types",
            "lists",
            "nothing",
            "dropped",
            "many",
        ]
    )
    texts = rng.choice([questions, answers])
    at = rng.randrange(2)
    label = kind
    if kind == "image":
        image, label = mutate_bytes(rng, image)
    elif kind == "text":
        texts[at], label = mutate_text(rng, texts[at])
    elif kind == "odd":
        texts[at] = rng.choice(ODD)
        label = f"{texts[at]!r:.60} in {'questions' if texts is questions else 'answers'}"
    elif kind == "counts":
        del texts[at:]
        label = f"{len(questions)} questions, {len(answers)} answers"
    elif kind == "many":
        questions, answers, label = questions * 500, answers * 500, "1,000 questions"
    elif kind == "types":
        image = rng.choice(
            [
                None,
                "",
                "/etc/passwd",
                3,
                np.zeros((4, 4, 3), np.uint8),
                processors.picture(),
                bytearray(image),
            ]
        )
        label = f"the image is {image!r:.50}"
    elif kind == "dropped":
        image, label = b"", "no image"
    elif kind == "lists":
        questions = rng.choice(
            [questions[0], b"one text", None, 3, {"a": 1}, tuple(questions), np.array(questions)]
        )
        label = f"questions = {questions!r:.60}"
    rows[bad] = Row(image, questions, answers)
    packed = rng.random() < 0.4
    settings = DataConfig(
        batch=2,
        questions=0 if packed else 2,
        prefix_length=96,
        length=320,
        patches=64,
        train="train",
        held_out="",
    )
    words, config = processor(place), tiny_config()

    def action():
        encoder = Encoder(Rows([row._asdict() for row in rows]), words, config)
        batches = train_batches(encoder, config, settings, 0)
        made = [next(batches) for _ in range(2)] + list(held_out_batches(encoder, config, settings))
        return made, encoder.conversation(bad).branch if packed else encoder[bad]

    return Case(
        f"{'packed' if packed else 'branches'}: {label}",
        action,
        lambda found: _check(found, rows[bad], packed),
    )


def _check(found: tuple, row: Row, packed: bool) -> str:
    """The bad row's tokens are Qwen's chat format of its words, and what is learnt are its
    answers.
    """
    batches, encoded = found
    for batch in batches:
        if not np.isfinite(batch.weights).all() or not (batch.weights.sum() > 0):
            return "a batch that teaches nothing"
    if not isinstance(row.questions, list | tuple | np.ndarray) or not isinstance(row.image, bytes):
        return f"accepted {type(row.questions).__name__}, {type(row.image).__name__}"
    texts = [*row.questions, *row.answers]
    if any(not isinstance(t, str | bytes | int) for t in texts):
        return "accepted what is no text"
    row = row._replace(
        questions=[_said(t) for t in row.questions], answers=[_said(t) for t in row.answers]
    )
    if len(row.questions) != len(row.answers):
        return "accepted questions without answers"
    picture = [{"type": "image", "image": row.image}] if row.image else []

    def turn(i: int, image: list) -> list[dict]:
        user = {"role": "user", "content": [*image, {"type": "text", "text": row.questions[i]}]}
        return [user, {"role": "assistant", "content": row.answers[i]}]

    if packed:
        dialogue = [
            m for i in range(len(row.questions)) for m in turn(i, picture if i == 0 else [])
        ]
        return _same(encoded.tokens, encoded.answer, dialogue, row.answers)
    for i, branch in enumerate(encoded.branches):
        tokens = np.concatenate([encoded.prefix.tokens, branch.tokens])
        answer = np.concatenate([np.zeros(len(encoded.prefix.tokens), bool), branch.answer])
        if wrong := _same(tokens, answer, turn(i, picture), [row.answers[i]]):
            return wrong
    return ""


def _said(text: str | bytes | int) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


def _same(tokens: np.ndarray, answer: np.ndarray, messages: list[dict], answers: list[str]) -> str:
    ids = [int(i) for n, i in enumerate(tokens) if not (n and i in PICTURES and tokens[n - 1] == i)]
    wanted = prompt_ids(messages, False)[:-1]
    if ids != wanted:
        return f"other tokens: {bytes(i for i in ids if i < 256)!r:.90}"
    learnt, said = (
        tokens[answer].tolist(),
        [
            i
            for a in answers
            for i in [*unicodedata.normalize("NFC", a).encode(), IDS["<|im_end|>"]]
        ],
    )
    return (
        ""
        if learnt == said
        else f"other answers are learnt: {bytes(i for i in learnt if i < 256)!r:.90}"
    )
