"""Rows become tokens: what an image's prefix is, what a question's branch is, what a whole conversation is."""

import threading
from typing import NamedTuple

import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.data.source import Row, Source
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import Processor

CACHE_BYTES = 1 << 30  # encoded rows kept in memory


class Branch(NamedTuple):
    """A question and its answer, as they follow the image."""

    tokens: np.ndarray  # [length] int32
    answer: np.ndarray  # [length] bool, the answer's tokens with its end of turn
    turn: tuple[str, str]  # question and answer in words (of a whole conversation: nothing)


class Encoded(NamedTuple):
    """A row in tokens. `prefix` ends with the image's last marker and is the same for every question."""

    prefix: np.ndarray  # [length] int32
    pixels: np.ndarray | None  # [patches, features] f32
    grid: np.ndarray | None  # [1, 3] int32
    branches: list[Branch]


class Encoder:
    """A data set's rows, encoded once and kept."""

    def __init__(self, source: Source, processor: Processor, config: ModelConfig):
        self.source, self.processor = source, processor
        self.vision_ids = [config.image_token_id, config.vision_end_token_id] if config.vision else []
        self._rows: dict[int, Encoded] = {}
        self._bytes = 0
        self._texts: dict[tuple[str, str], Branch] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> Encoded:
        if (row := self._rows.get(number)) is None:
            row = self.encode(self.source[number], f"{self.source.name} {self.source.split} row {number}")
            with self._lock:
                self._bytes += 0 if row.pixels is None else row.pixels.nbytes
                if self._bytes < CACHE_BYTES:
                    self._rows[number] = row
        return row

    def encode(self, row: Row, where: str) -> Encoded:
        """A row with one branch for every question."""
        if not row.questions:
            raise InfiniteVLError(f"{where} has no question", "every row holds at least one question with its answer")
        first = self._example(row, 0, where)
        cut = self._cut(first["input_ids"])
        prefix = first["input_ids"][:cut]
        branches = []
        for i, turn in enumerate(zip(row.questions, row.answers, strict=True)):
            if turn not in self._texts:
                example = first if i == 0 else self._example(row, i, where)
                if not np.array_equal(example["input_ids"][:cut], prefix):
                    raise InfiniteVLError(
                        f"{where}: the chat template writes something before the image that depends on the question",
                        "use a template that puts the image first, or train with train.data.questions=0 (packed conversations)",
                    )
                self._texts[turn] = _branch(example["input_ids"][cut:], example["answer_mask"][cut:], turn)
            branches.append(self._texts[turn])
        return Encoded(prefix, first.get("pixel_values"), first.get("image_grid_thw"), branches)

    def conversation(self, number: int) -> tuple[Branch, np.ndarray | None, np.ndarray | None]:
        """A row as one conversation of several turns: its tokens, pixels and grid."""
        row = self.source[number]
        messages = []
        for i, (question, answer) in enumerate(zip(row.questions, row.answers, strict=True)):
            messages += _turn(row.image if i == 0 else b"", question, answer)
        example = self.processor.encode_example(messages)
        return _branch(example["input_ids"], example["answer_mask"]), example.get("pixel_values"), example.get("image_grid_thw")

    def _example(self, row: Row, turn: int, where: str) -> dict[str, np.ndarray]:
        try:
            return self.processor.encode_example(_turn(row.image, row.questions[turn], row.answers[turn]))
        except InfiniteVLError as error:
            raise InfiniteVLError(f"{where}: {error.culprit}", error.cure) from error

    def _cut(self, tokens: np.ndarray) -> int:
        """How many tokens stand up to the end of the image."""
        last = np.flatnonzero(np.isin(tokens, self.vision_ids))
        return int(last[-1]) + 1 if len(last) else 0


def _turn(image: bytes, question: str, answer: str) -> list[dict]:
    """The image comes before the text, as the model's evaluation has it."""
    picture = [{"type": "image", "image": image}] if image else []
    user = {"role": "user", "content": [*picture, {"type": "text", "text": question}]}
    return [user, {"role": "assistant", "content": answer}]


def _branch(tokens: np.ndarray, answer: np.ndarray, turn: tuple[str, str] = ("", "")) -> Branch:
    """Without what the template writes after the last answer: nothing is learnt there."""
    end = int(np.flatnonzero(answer)[-1]) + 1
    return Branch(tokens[:end].astype(np.int32), answer[:end], turn)
