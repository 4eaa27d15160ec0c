"""Rows of a data set in tokens: as an image's prefix with a branch for each question, or as one
conversation."""

import contextlib
import copy
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.train import DataConfig
from infinitevl_jax.data.dataset import Dataset, Row
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.inputs.batch import TokenSequence
from infinitevl_jax.processing import Processor

CACHE_BYTES = 1 << 30  # of encoded rows kept in memory


class Branch(NamedTuple):
    """A question and its answer, as they follow the image; or a whole conversation."""

    tokens: np.ndarray  # [length] int32
    answer: np.ndarray  # [length] bool, True for an answer's tokens and its end of turn
    turn: tuple[str, str]  # question and answer as text; empty for a whole conversation

    @property
    def inputs(self) -> TokenSequence:
        """What the model reads: the last token is only predicted."""
        return TokenSequence(self.tokens[:-1])

    @property
    def question(self) -> TokenSequence:
        """The tokens before the answer."""
        return TokenSequence(self.tokens[: int(np.argmax(self.answer))])


class EncodedRow(NamedTuple):
    """A row as an image and questions about it."""

    prefix: TokenSequence  # up to the image's end marker, the same for every question
    branches: list[Branch]


class EncodedConversation(NamedTuple):
    """A row as one conversation of several turns."""

    branch: Branch
    pixels: np.ndarray | None  # [patches, features] f32
    grids: np.ndarray | None  # [images, 3] int32

    @property
    def inputs(self) -> TokenSequence:
        return TokenSequence(self.branch.tokens[:-1], self.pixels, self.grids)

    @property
    def tokens(self) -> int:
        """Tokens that it takes in a row."""
        return len(self.branch.tokens) - 1

    @property
    def patches(self) -> int:
        """Patches that it takes in a row."""
        return 0 if self.pixels is None else len(self.pixels)


class Encoder:
    """A data set's rows, encoded once and kept. A row that cannot be used raises BadRow."""

    def __init__(self, dataset: Dataset, processor: Processor, config: ModelConfig):
        self.dataset, self.processor, self.config = dataset, processor, config
        self.data: DataConfig | None = None
        self._kept = _Cache()

    def __len__(self) -> int:
        return len(self.dataset)

    def within(self, data: DataConfig) -> "Encoder":
        """The same rows; one that does not fit the shapes of `data` raises BadRow. Rows that are
        encoded already are shared."""
        other = copy.copy(self)
        other.data = data
        return other

    def __getitem__(self, number: int) -> EncodedRow:
        """Row `number` with one branch for every question."""
        with self._naming(number):
            row = self._kept.get(("row", number), lambda: self._encode(self.dataset[number]))
            if self.data is not None:
                _check_branches(row, self.data)
            return row

    def conversation(self, number: int) -> EncodedConversation:
        """Row `number` as one conversation."""
        with self._naming(number):
            row = self._kept.get(
                ("conversation", number), lambda: self._converse(self.dataset[number])
            )
            if self.data is not None:
                _check_conversation(row, self.data)
            return row

    @contextlib.contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """Errors name the row."""
        try:
            yield
        except BadRow:
            raise
        except InfiniteVLError as error:
            raise BadRow(self.dataset.title, number, error.culprit, error.cure) from error

    def _encode(self, row: Row) -> EncodedRow:
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
        prefix = TokenSequence(prefix, first.get("pixel_values"), first.get("image_grid_thw"))
        return EncodedRow(prefix, branches)

    def _converse(self, row: Row) -> EncodedConversation:
        messages = []
        for i, (question, answer) in enumerate(zip(row.questions, row.answers, strict=True)):
            messages += _turn(row.image if i == 0 else b"", question, answer)
        example = self.processor.encode_example(messages)
        branch = _branch(example["input_ids"], example["answer_mask"])
        return EncodedConversation(
            branch, example.get("pixel_values"), example.get("image_grid_thw")
        )

    def _example(self, row: Row, turn: int) -> dict[str, np.ndarray]:
        return self.processor.encode_example(
            _turn(row.image, row.questions[turn], row.answers[turn])
        )

    def _cut(self, tokens: np.ndarray) -> int:
        """Number of tokens up to the end of the last image, its end marker included."""
        seen = np.flatnonzero(tokens == self.config.image_token_id) if self.config.vision else []
        if not len(seen):
            return 0
        cut = int(seen[-1]) + 1
        return cut + int(cut < len(tokens) and tokens[cut] == self.config.vision_end_token_id)


class _Cache:
    """A cache of values, filled until it holds CACHE_BYTES. A key holds all that its value depends
    on."""

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
    """Messages of one turn. The image comes before the text, as in the model's evaluation."""
    picture = [{"type": "image", "image": image}] if image else []
    user = {"role": "user", "content": [*picture, {"type": "text", "text": question}]}
    return [user, {"role": "assistant", "content": answer}]


def _branch(tokens: np.ndarray, answer: np.ndarray, turn: tuple[str, str] = ("", "")) -> Branch:
    """A branch that ends with its last answer: what the template writes after it is not trained
    on."""
    end = int(np.flatnonzero(answer)[-1]) + 1
    return Branch(tokens[:end].astype(np.int32), answer[:end], turn)


def _check_branches(row: EncodedRow, data: DataConfig) -> None:
    """Raises InfiniteVLError for a row that does not fit the shapes of a batch of branches."""
    if len(row.prefix.tokens) > data.prefix_length:
        raise InfiniteVLError(
            f"the image's prefix has {len(row.prefix.tokens)} tokens, train.data.prefix_length is"
            f" {data.prefix_length}",
            f"train.data.prefix_length={len(row.prefix.tokens)}, or make images smaller"
            " (model.max_pixels)",
        )
    longest = max(len(branch.inputs.tokens) for branch in row.branches)
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


def _check_conversation(row: EncodedConversation, data: DataConfig) -> None:
    """Raises InfiniteVLError for a conversation that is larger than a packed row."""
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
