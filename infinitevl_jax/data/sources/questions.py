"""Rows of an image and questions: {"image": "a.jpg", "questions": [...], "answers": [...]}, or one
`question` and `answer`."""

from pathlib import Path
from typing import Any

import msgspec

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation, from_questions
from infinitevl_jax.data.curriculum import Curriculum
from infinitevl_jax.data.media import Media
from infinitevl_jax.data.records import open_records
from infinitevl_jax.data.sources import Source, register_source
from infinitevl_jax.data.sources.files import FileSource, folders, options
from infinitevl_jax.data.splits import select_rows
from infinitevl_jax.errors import InfiniteVLError


class Row(msgspec.Struct):
    """Questions about one image, or about none. Other keys mean nothing."""

    image: Any = None
    question: str | None = None
    answer: str | None = None
    questions: list[str] = []
    answers: list[str] = []


def conversation(row: Row, media: Media) -> Conversation:
    """The row's turns."""
    questions = row.questions + ([] if row.question is None else [row.question])
    answers = row.answers + ([] if row.answer is None else [row.answer])
    if len(questions) != len(answers) or not questions:
        raise InfiniteVLError(
            f"it has {len(questions)} questions and {len(answers)} answers",
            "give one answer to each question, and at least one question",
        )
    image = b"" if row.image in (None, "") else media.source(row.image, "image")
    return from_questions(image, questions, answers)


class QuestionFile(FileSource[Row]):
    """Such rows, whose questions are drawn by a curriculum."""

    curriculum: Curriculum


def open_questions(config: SourceConfig, split: str) -> Source:
    """Open a JSON, JSONL or parquet file of such rows."""
    curriculum = options(config, Curriculum)
    records = open_records(path := Path(config.path))
    rows = select_rows(split, len(records), str(path))
    source = QuestionFile(str(path), records, rows, Row, conversation, folders(config))
    source.curriculum = curriculum
    return source


register_source("questions", open_questions)
