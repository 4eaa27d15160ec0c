"""Rows in tokens: as pictures with a branch for each question, or as one sequence or several."""

import contextlib
import copy
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.data.conversation import Conversation, Turns, as_turns, turn
from infinitevl_jax.data.cut import cut_sequence, divide
from infinitevl_jax.data.encoded import Branch, EncodedConversation, EncodedRow
from infinitevl_jax.data.mixture import Mixture
from infinitevl_jax.data.sources import Source
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.inputs.batch import TokenSequence
from infinitevl_jax.processing import Processor

CACHE_BYTES = 1 << 30  # of encoded rows kept in memory


class Encoder:
    """Rows in tokens, encoded once and kept. A row that cannot be used raises BadRow."""

    def __init__(
        self,
        dataset: Mixture | Source,
        processor: Processor,
        config: ModelConfig,
        cache_bytes: int = CACHE_BYTES,
    ):
        """
        Args:
          dataset: a mixture, or one source.
          cache_bytes: of encoded rows that are kept, in each process.
        """
        self.dataset = dataset if isinstance(dataset, Mixture) else Mixture({"": dataset})
        self.processor, self.config = processor, config
        self.data: DataConfig | None = None
        self._kept = _Cache(cache_bytes)

    def __len__(self) -> int:
        return len(self.dataset)

    def within(self, data: DataConfig) -> "Encoder":
        """The same rows; one that does not fit the shapes of `data` raises BadRow. Rows that are
        encoded already are shared."""
        other = copy.copy(self)
        other.data = data
        if data.workers:  # each has a cache of its own
            other._kept = _Cache(self._kept.limit // data.workers)
        return other

    def __getitem__(self, number: int) -> EncodedRow:
        """Row `number` with one branch for every question."""
        with self._naming(number):
            row = self._kept.get(("row", number), lambda: self._encode(self.dataset[number]))
            if self.data is not None:
                _check_branches(row, self.data)
            return row

    def conversation(self, number: int) -> EncodedConversation:
        """Row `number` as one conversation, or the first part of a document."""
        return self.pieces(number)[0]

    def pieces(self, number: int) -> list[EncodedConversation]:
        """Row `number` as what is packed: one conversation, or a document's parts in order.

        A conversation that is larger than a row of `within` is cut or unusable, as `too_long` says.
        """
        with self._naming(number):
            row = self._kept.get(("whole", number), lambda: self._whole(self.dataset[number]))
            if self.data is None:
                return [row]
            if row.document:
                return divide(row, self.data.length)
            if self.data.too_long == "cut":
                return [cut_sequence(row, self.data.length, self.data.patches, self.config)]
            _check_conversation(row, self.data)
            return [row]

    @contextlib.contextmanager
    def _naming(self, number: int) -> Iterator[None]:
        """Errors name the row."""
        try:
            yield
        except BadRow as row:
            title, _ = self.dataset.place(number)
            if row.source == title:
                raise
            raise BadRow(title, row.index, row.reason, row.cure) from row
        except InfiniteVLError as error:
            title, index = self.dataset.place(number)
            raise BadRow(title, index, error.culprit, error.cure) from error
        except Exception as error:  # of a source or library, which a worker may hand over
            title, index = self.dataset.place(number)
            error.add_note(f"while reading {title} row {index}")
            raise

    def _encode(self, row: Conversation) -> EncodedRow:
        turns = as_turns(row)
        first = self._example(turns, 0)
        cut = self._cut(first["input_ids"])
        prefix = first["input_ids"][:cut]
        # A template's header depends on what stands in the conversation: words alone do not tell
        # their tokens.
        header = prefix[prefix != self.config.image_token_id].tobytes()

        def branch(number: int) -> Branch:
            example = first if number == 0 else self._example(turns, number)
            if not np.array_equal(example["input_ids"][:cut], prefix):
                raise InfiniteVLError(
                    "the chat template writes something before the image that depends on the"
                    " question",
                    "use a template that puts the image first, or train with train.data.questions=0"
                    " (packed conversations)",
                )
            words = turns.questions[number], turns.answers[number]
            return _branch(example["input_ids"][cut:], example["answer_mask"][cut:], words)

        branches = [
            self._kept.get(
                ("turn", len(turns.pictures), header, question, answer), lambda i=i: branch(i)
            )
            for i, (question, answer) in enumerate(zip(turns.questions, turns.answers, strict=True))
        ]
        prefix = TokenSequence(prefix, first.get("pixel_values"), first.get("image_grid_thw"))
        return EncodedRow(prefix, branches)

    def _whole(self, row: Conversation) -> EncodedConversation:
        if row.text is not None:
            tokens = self.processor.encode_document(row.text, closed=row.complete)
            if len(tokens) < 2:
                raise InfiniteVLError("the document is empty", "leave it out")
            branch = Branch(tokens, np.ones(len(tokens), bool), ("", ""))
            return EncodedConversation(branch, document=True)
        example = self.processor.encode_example(_without_weights(row.messages), tools=row.tools)
        mask = _weighted(example["answer_mask"], row.messages)
        branch = Branch(example["input_ids"].astype(np.int32), mask, ("", ""))
        names = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        vision = [example.get(name) for name in (*names, "second_per_grid_ts")]
        return cut_sequence(EncodedConversation(branch, *vision), None, None, self.config)

    def _example(self, turns: Turns, number: int) -> dict[str, np.ndarray]:
        return self.processor.encode_example(
            turn(turns.pictures, turns.questions[number], turns.answers[number])
        )

    def _cut(self, tokens: np.ndarray) -> int:
        """Number of tokens up to the end of the last image, its end marker included."""
        seen = np.flatnonzero(tokens == self.config.image_token_id) if self.config.vision else []
        if not len(seen):
            return 0
        cut = int(seen[-1]) + 1
        return cut + int(cut < len(tokens) and tokens[cut] == self.config.vision_end_token_id)


class _Cache:
    """A cache of values, filled until it holds `limit` bytes. A key holds all that its value
    depends on. Its copy in another process is empty."""

    def __init__(self, limit: int):
        self.limit = limit
        self._values: dict[Hashable, Any] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return _Cache, (self.limit,)

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if (value := self._values.get(key)) is None:
            value = make()
            with self._lock:
                if self._bytes < self.limit:
                    self._values[key] = value
                    self._bytes += _size(value) + _size(key)
        return value


def _size(value: Any) -> int:
    """Bytes of the arrays and texts in a value, about."""
    if isinstance(value, list | tuple):
        return 64 + sum(_size(part) for part in value)
    return getattr(value, "nbytes", 0) or (len(value) if isinstance(value, str | bytes) else 8)


def _without_weights(messages: Sequence[dict]) -> list[dict]:
    if not any("weight" in m for m in messages):
        return list(messages)
    return [{key: m[key] for key in m if key != "weight"} for m in messages]


def _weighted(answer: np.ndarray, messages: Sequence[dict]) -> np.ndarray:
    """The answer mask without the answers of weight 0."""
    said = [m.get("weight") for m in messages if m.get("role") == "assistant"]
    if all(weight is None for weight in said):
        return answer
    if bad := [w for w in said if w is not None and (isinstance(w, bool) or w not in (0, 1))]:
        raise InfiniteVLError(f"the weight of a message is {bad[0]!r}", "give 0 or 1")
    edges = np.diff(answer.astype(np.int8), prepend=0, append=0)
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if len(starts) != len(said):
        raise InfiniteVLError(
            "the answers cannot be told apart, so their weights cannot be used",
            "take the images out of the answers, or the weights",
        )
    kept = answer.copy()
    for start, stop, weight in zip(starts, stops, said, strict=True):
        kept[start:stop] &= weight != 0
    return kept


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
