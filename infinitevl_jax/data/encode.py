"""Rows become tokens: what an image's prefix is, what a question's branch is, what a whole
conversation is."""

import contextlib
import copy
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.train import DataConfig
from infinitevl_jax.data.source import Row, Source
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.processing import Processor

CACHE_BYTES = 1 << 30  # of encoded rows kept in memory


class Branch(NamedTuple):
    """A question and its answer, as they follow the image."""

    tokens: np.ndarray  # [length] int32
    answer: np.ndarray  # [length] bool, the answer's tokens with its end of turn
    turn: tuple[str, str]  # question and answer in words (of a whole conversation: nothing)


class Encoded(NamedTuple):
    """A row in tokens. `prefix` ends with the image's last marker and is the same for every
    question."""

    prefix: np.ndarray  # [length] int32
    pixels: np.ndarray | None  # [patches, features] f32
    grid: np.ndarray | None  # [1, 3] int32
    branches: list[Branch]


class Packable(NamedTuple):
    """A row as one conversation of several turns."""

    branch: Branch
    pixels: np.ndarray | None  # [patches, features] f32
    grid: np.ndarray | None  # [1, 3] int32

    @property
    def tokens(self) -> int:
        """Tokens that it takes in a row: the last one is never an input."""
        return len(self.branch.tokens) - 1

    @property
    def patches(self) -> int:
        return 0 if self.pixels is None else len(self.pixels)


class Encoder:
    """A data set's rows, encoded once and kept. Every row that cannot be used is a BadRow."""

    def __init__(self, source: Source, processor: Processor, config: ModelConfig):
        self.source, self.processor, self.config = source, processor, config
        self.data: DataConfig | None = None
        self._kept = _Kept()

    def __len__(self) -> int:
        return len(self.source)

    def within(self, data: DataConfig) -> "Encoder":
        """The same rows, those that do not fit the shapes of `data` being BadRows. What is encoded
        already is shared."""
        other = copy.copy(self)
        other.data = data
        return other

    def __getitem__(self, number: int) -> Encoded:
        """Row `number` with one branch for every question."""
        with self._naming(number):
            row = self._kept.get(("row", number), lambda: self._encode(self.source[number]))
            if self.data is not None:
                _check_branches(row, self.data)
            return row

    def conversation(self, number: int) -> Packable:
        """Row `number` as one conversation."""
        with self._naming(number):
            row = self._kept.get(
                ("conversation", number), lambda: self._converse(self.source[number])
            )
            if self.data is not None:
                _check_packable(row, self.data)
            return row

    @contextlib.contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """Errors name the row."""
        try:
            yield
        except BadRow:
            raise
        except InfiniteVLError as error:
            raise BadRow(self.source.title, number, error.culprit, error.cure) from error

    def _encode(self, row: Row) -> Encoded:
        first = self._example(row, 0)
        cut = self._cut(first["input_ids"])
        prefix = first["input_ids"][:cut]
        # A template's header depends on what stands in the conversation: words alone do not tell
        # their tokens.
        header = prefix[prefix != self.config.image_token_id].tobytes()

        def branch(turn: int) -> Branch:
            example = first if turn == 0 else self._example(row, turn)
            if not np.array_equal(example["input_ids"][:cut], prefix):
                raise InfiniteVLError(
                    "the chat template writes something before the image that depends on the"
                    " question",
                    "use a template that puts the image first, or train with train.data.questions=0"
                    " (packed conversations)",
                )
            words = row.questions[turn], row.answers[turn]
            return _branch(example["input_ids"][cut:], example["answer_mask"][cut:], words)

        branches = [
            self._kept.get(
                ("turn", bool(row.image), header, question, answer), lambda turn=turn: branch(turn)
            )
            for turn, (question, answer) in enumerate(zip(row.questions, row.answers, strict=True))
        ]
        return Encoded(prefix, first.get("pixel_values"), first.get("image_grid_thw"), branches)

    def _converse(self, row: Row) -> Packable:
        messages = []
        for i, (question, answer) in enumerate(zip(row.questions, row.answers, strict=True)):
            messages += _turn(row.image if i == 0 else b"", question, answer)
        example = self.processor.encode_example(messages)
        branch = _branch(example["input_ids"], example["answer_mask"])
        return Packable(branch, example.get("pixel_values"), example.get("image_grid_thw"))

    def _example(self, row: Row, turn: int) -> dict[str, np.ndarray]:
        return self.processor.encode_example(
            _turn(row.image, row.questions[turn], row.answers[turn])
        )

    def _cut(self, tokens: np.ndarray) -> int:
        """How many tokens stand up to the end of the image, its end marker included."""
        seen = np.flatnonzero(tokens == self.config.image_token_id) if self.config.vision else []
        if not len(seen):
            return 0
        cut = int(seen[-1]) + 1
        return cut + int(cut < len(tokens) and tokens[cut] == self.config.vision_end_token_id)


class _Kept:
    """Values made once, as long as they take less than CACHE_BYTES together.

    The key holds all that a value depends on.
    """

    def __init__(self):
        self._values: dict[Hashable, Any] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if (value := self._values.get(key)) is None:
            value = make()
            with self._lock:
                if self._bytes < CACHE_BYTES:
                    self._values[key] = value
                    self._bytes += _size(value) + _size(key)
        return value


def _size(value: Any) -> int:
    """Bytes of the arrays and texts in a value, about."""
    if isinstance(value, list | tuple):
        return 64 + sum(_size(part) for part in value)
    return getattr(value, "nbytes", 0) or (len(value) if isinstance(value, str | bytes) else 8)


def _turn(image: bytes, question: str, answer: str) -> list[dict]:
    """The image comes before the text, as the model's evaluation has it."""
    picture = [{"type": "image", "image": image}] if image else []
    user = {"role": "user", "content": [*picture, {"type": "text", "text": question}]}
    return [user, {"role": "assistant", "content": answer}]


def _branch(tokens: np.ndarray, answer: np.ndarray, turn: tuple[str, str] = ("", "")) -> Branch:
    """Without what the template writes after the last answer: nothing is learnt there."""
    end = int(np.flatnonzero(answer)[-1]) + 1
    return Branch(tokens[:end].astype(np.int32), answer[:end], turn)


def _check_branches(row: Encoded, data: DataConfig) -> None:
    """Raises InfiniteVLError for a row with more tokens than a batch of branches has room for."""
    if len(row.prefix) > data.prefix_length:
        raise InfiniteVLError(
            f"the image's prefix has {len(row.prefix)} tokens, train.data.prefix_length is"
            f" {data.prefix_length}",
            f"train.data.prefix_length={len(row.prefix)}, or make images smaller"
            " (model.max_pixels)",
        )
    longest = max(len(branch.tokens) for branch in row.branches) - 1
    if longest > data.length:
        raise InfiniteVLError(
            f"a question with its answer takes {longest} tokens, train.data.length is"
            f" {data.length}",
            f"train.data.length={longest} or more",
        )
    if any(branch.answer[0] for branch in row.branches):
        raise InfiniteVLError(
            "the answer follows the image at once, with no text between",
            "use a chat template that opens the answer",
        )


def _check_packable(row: Packable, data: DataConfig) -> None:
    """Raises InfiniteVLError for a conversation that no row has room for."""
    for needed, what, name in (
        (row.tokens, "tokens", "length"),
        (row.patches, "patches", "patches"),
    ):
        limit = getattr(data, name)
        if needed > limit:
            raise InfiniteVLError(
                f"the conversation takes {needed} {what}, train.data.{name} is {limit}",
                f"train.data.{name}={needed} or more, or smaller images (model.max_pixels)",
            )
