"""Corpora of a folder of texts, as sources of a stage and as held-out tokens.

A corpus is an entry of the folder TEXTS: a subfolder with a document in each file (plain or .xz),
or a file of conversations, such as those of `benchmarks.training.sample` (JSONL). Its name is that
of the entry without suffix.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from infinitevl_jax.config.data import DataConfig, SourceConfig
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.data.collate import PackedRows, rows_batch
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.encoded import Branch, EncodedConversation
from infinitevl_jax.data.mixture import open_mixture
from infinitevl_jax.data.pipeline import held_out_batches
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import Processor

CHUNK = 1 << 20  # bytes of a document in one row


@dataclass(frozen=True)
class Corpus:
    """One entry of TEXTS.

    Attributes:
      conversations: whether it is a file of conversations, and not a folder of documents.
      unseen: no stage trains on it.
    """

    name: str
    path: Path
    conversations: bool
    unseen: bool


def find_corpora(texts: Path, unseen: Sequence[str]) -> dict[str, Corpus]:
    """The corpora of a folder by name.

    Raises:
      InfiniteVLError: the folder has none.
    """
    entries = sorted(texts.iterdir()) if texts.is_dir() else []
    found = {path.name.partition(".")[0]: path for path in entries if not path.name.startswith(".")}
    if not found:
        raise InfiniteVLError(
            f"{texts} holds no corpora",
            "make a subfolder for each, with one document in each file",
        )
    return {
        name: Corpus(name, path, path.is_file(), name in unseen) for name, path in found.items()
    }


def stage_sources(
    given: Mapping[str, Mapping[str, Any]], corpora: Mapping[str, Corpus], kinds: Sequence[bool]
) -> dict[str, dict[str, Any]]:
    """The sources of a stage as a table of a preset.

    Args:
      given: the preset's own table. What it does not say of a corpus is as of the first in it; the
        weight is then 1.
      kinds: `Corpus.conversations` of what the stage trains on.

    Raises:
      InfiniteVLError: there is no such corpus.
    """
    chosen = [c for c in corpora.values() if not c.unseen and c.conversations in kinds]
    if not chosen:
        raise InfiniteVLError(
            "there is no corpus of " + ("conversations" if kinds == (True,) else "documents"),
            "python -m benchmarks.training.sample lets the teacher write conversations"
            if kinds == (True,)
            else "make a subfolder for each, with one document in each file",
        )
    first = {key: value for key, value in next(iter(given.values())).items() if key != "weight"}
    found = {}
    for corpus in chosen:
        table = {**first, **given.get(corpus.name, {}), "path": str(corpus.path)}
        if corpus.conversations:
            table.pop("options", None)
        found[corpus.name] = table
    return found


class HeldOutText:
    """Held-out rows of a corpus: of an unseen one all, else those that no stage trains on."""

    def __init__(
        self,
        corpus: Corpus,
        source: Mapping[str, Any] | None,
        processor: Processor,
        config: ModelConfig,
        data: DataConfig,
    ):
        """
        Args:
          source: the corpus as the first stage has it; None for an unseen one.
          data: shape of the batches.
        """
        options: dict[str, Any] = {} if corpus.conversations else {"whole": True, "chunk": CHUNK}
        split = "train" if source is None else source.get("held_out", "")
        if not split:
            raise InfiniteVLError(
                f"the corpus {corpus.name} has no held-out rows",
                f'give train.data.sources.{corpus.name}.held_out, such as "train[95%:]"',
            )
        config_of = SourceConfig(path=str(corpus.path), held_out=split, options=options)
        rows = open_mixture(DataConfig(sources={corpus.name: config_of}), held_out=True)
        self.encoder, self.config, self.data = Encoder(rows, processor, config), config, data

    def batches(self, rows: int) -> Iterator[TrainBatch]:
        """Packed rows, about `rows` of them."""
        made = held_out_batches(self.encoder, self.config, self.data)
        return islice(made, max(1, rows // self.data.batch))

    def stretches(self, length: int, count: int) -> list[np.ndarray]:
        """Up to `count` times `length` tokens of documents that follow one another."""
        found: list[np.ndarray] = []
        room = length * count
        for number in range(len(self.encoder)):
            if room <= 0:
                break
            found.append(self.encoder.conversation(number).branch.tokens)
            room -= len(found[-1])
        tokens = np.concatenate(found) if found else np.zeros(0, np.int32)
        return [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)][
            :count
        ]

    def beginnings(self, length: int, count: int) -> np.ndarray:
        """The first tokens [up to `count`, length] of documents that are longer."""
        found: list[np.ndarray] = []
        for number in range(len(self.encoder)):
            if len(found) == count:
                break
            tokens = self.encoder.conversation(number).branch.tokens
            if len(tokens) > length:
                found.append(tokens[:length])
        return np.array(found, np.int32).reshape(-1, length)


def marked(tokens: np.ndarray, first: int) -> EncodedConversation:
    """A sequence whose tokens from `first` on bear loss."""
    answer = np.arange(len(tokens)) >= first
    return EncodedConversation(Branch(np.asarray(tokens, np.int32), answer, ("", "")))


def row_batches(
    sequences: Sequence[EncodedConversation], config: ModelConfig, rows: int, length: int
) -> Iterator[TrainBatch]:
    """One sequence a row; rows of padding fill the last batch."""
    data = DataConfig(batch=rows, length=length)
    for at in range(0, len(sequences), rows):
        part = [[sequence] for sequence in sequences[at : at + rows]]
        yield rows_batch(part + [[]] * (rows - len(part)), data, config)


def packed_batches(
    sequences: Sequence[EncodedConversation], config: ModelConfig, rows: int, length: int
) -> Iterator[TrainBatch]:
    """As many sequences a row as fit.

    Raises:
      InfiniteVLError: one is longer than a row.
    """
    data = DataConfig(batch=rows, length=length)
    if (longest := max(sequence.tokens for sequence in sequences)) > length:
        raise InfiniteVLError(
            f"a prompt and what follows take {longest} tokens, a row has {length}",
            "make figures.length larger, or figures.new_tokens smaller",
        )
    packed = PackedRows(config, data, rows)
    for sequence in sequences:
        if not packed.add(sequence):
            yield packed.batch()
            packed = PackedRows(config, data, rows)
            packed.add(sequence)
    if packed.conversations:
        yield packed.batch()
