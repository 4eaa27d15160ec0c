"""Training rows: pictures, questions and answers that do not fit, up to the batch."""

import io
from random import Random

import numpy as np
from tiny_folder import tiny_config

from infinitevl_jax.config.train import DataConfig
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.pipeline import held_out_batches, train_batches
from infinitevl_jax.data.source import Row

from ..case import Case, Place
from ..content import ODD_TEXT, mutate_bytes, mutate_text
from . import processors
from .messages import PICTURES, processor
from .processors import byte_ids, chat

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
ODD += [None, 3, float("nan"), b"bytes", b"\xff\xfe", ["a"], np.str_("x")]
QUESTIONS, ANSWERS = ["what color is it?", "is it red?"], ["blue", "no"]


class Rows:
    """A data set in memory, with a Source's surface."""

    name, split = "rows", "train"

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[int(number)]


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
        encoder = Encoder(Rows(rows), words, config)
        batches = train_batches(encoder, config, settings, 0)
        made = [next(batches) for _ in range(2)] + list(held_out_batches(encoder, config, settings))
        return made, encoder.conversation(bad)[0] if packed else encoder[bad]

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
    if len(row.questions) != len(row.answers):
        return "accepted questions without answers"
    if not all(isinstance(t, str) for t in (*row.questions, *row.answers)):
        return "accepted what is no text"
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
        tokens = np.concatenate([encoded.prefix, branch.tokens])
        answer = np.concatenate([np.zeros(len(encoded.prefix), bool), branch.answer])
        if wrong := _same(tokens, answer, turn(i, picture), [row.answers[i]]):
            return wrong
    return ""


def _same(tokens: np.ndarray, answer: np.ndarray, messages: list[dict], answers: list[str]) -> str:
    ids = [int(i) for n, i in enumerate(tokens) if not (n and i in PICTURES and tokens[n - 1] == i)]
    wanted = byte_ids(chat(messages, False).removesuffix("\n"))
    if ids != wanted:
        return f"other tokens: {bytes(i for i in ids if i < 256)!r:.90}"
    learnt, said = tokens[answer].tolist(), [i for a in answers for i in byte_ids(a + "<|im_end|>")]
    return (
        ""
        if learnt == said
        else f"other answers are learnt: {bytes(i for i in learnt if i < 256)!r:.90}"
    )
