"""Batches of plain text: a folder of text files, a subfolder for each corpus, whole documents held
out."""

import hashlib
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.model_inputs import DecoderInputs
from infinitevl_jax.processing import Processor

HELD_OUT = 20  # every 20th document, by the hash of its name


def documents(folder: Path) -> list[Path]:
    """Text files of a corpus, plain or as xz, sorted by name."""
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not found:
        raise InfiniteVLError(f"{folder} has no text files", "put one file per document there")
    return found


def is_held_out(document: Path) -> bool:
    digest = hashlib.sha256(document.name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT == 0


def read_text(document: Path) -> str:
    data = document.read_bytes()
    return (lzma.decompress(data) if document.suffix == ".xz" else data).decode("utf-8")


class Corpus:
    """Documents as tokens, kept as one array beside a run.

    Attributes:
      train, held_out: documents, each [length] int32.
    """

    def __init__(self, folder: Path, processor: Processor, aside: Path, trained: bool = True):
        """Read and tokenise a corpus, or read the tokens of an earlier call.

        Args:
          aside: folder for the tokens.
          trained: False holds out all documents.
        """
        files = documents(folder)
        path = aside / f"{folder.name}.npz"
        if not path.exists():
            backend = processor.tokenizer.backend
            tokens = [
                np.array(backend.encode(read_text(f), add_special_tokens=False).ids, np.int32)
                for f in files
            ]
            aside.mkdir(parents=True, exist_ok=True)
            work = path.with_name(f".{path.name}.partial.npz")
            np.savez(work, tokens=np.concatenate(tokens), ends=np.cumsum([len(t) for t in tokens]))
            work.rename(path)
        with np.load(path) as stored:
            whole = np.split(stored["tokens"], stored["ends"][:-1])
        if len(whole) != len(files):
            raise InfiniteVLError(f"{path} is of other documents", "remove it")
        held = [not trained or is_held_out(file) for file in files]
        self.name = folder.name
        self.train = [t for t, out in zip(whole, held, strict=True) if not out and len(t) > 1]
        self.held_out = [t for t, out in zip(whole, held, strict=True) if out and len(t) > 1]


def batch_of(rows: Sequence[Sequence[np.ndarray]], length: int, first: int = 0) -> TrainBatch:
    """Rows of packed pieces of text.

    Args:
      rows: pieces of each row, whose last tokens are only predicted.
      first: place in a piece from which predictions count.
    """
    shape = len(rows), length
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    index, segments = np.full(shape, -1, np.int32), np.zeros(shape, np.int32)
    weights = np.zeros(shape, np.float32)
    for row, pieces in enumerate(rows):
        start = 0
        for number, piece in enumerate(pieces):
            end = start + len(piece) - 1
            part = row, slice(start, end)
            tokens[part], targets[part] = piece[:-1], piece[1:]
            index[part], segments[part] = np.arange(end - start), number
            weights[row, start + first : end] = 1
            start = end
    return TrainBatch(
        None, None, DecoderInputs(tokens, index, segments, None, None), None, targets, weights
    )


def training_batches(
    texts: Sequence[np.ndarray], rows: int, length: int, seed: int, skip: int = 0
) -> Iterator[TrainBatch]:
    """Endless batches; the documents follow each other in a new order each epoch.

    Args:
      skip: batches to leave out, as a resumed run does.
    """
    pieces = _pieces(texts, length, seed)
    while True:
        filled = [list(_fill(pieces, length)) for _ in range(rows)]
        if skip:
            skip -= 1
        else:
            yield batch_of(filled, length)


class _Pieces:
    """Documents in an endless order, cut to what a row has room for."""

    def __init__(self, texts: Sequence[np.ndarray], seed: int):
        self.texts, self.rng = texts, np.random.default_rng(seed)
        self.order: list[int] = []
        self.rest = np.zeros(0, np.int32)

    def take(self, room: int) -> np.ndarray:
        """The next piece, at most room + 1 tokens."""
        if len(self.rest) < 2:
            if not self.order:
                self.order = list(self.rng.permutation(len(self.texts)))
            self.rest = self.texts[self.order.pop()]
        piece, self.rest = self.rest[: room + 1], self.rest[room:]
        return piece


def _pieces(texts: Sequence[np.ndarray], length: int, seed: int) -> _Pieces:
    if not texts:
        raise InfiniteVLError("no document is left to train on", "add documents")
    return _Pieces(texts, seed)


def _fill(pieces: _Pieces, length: int) -> Iterator[np.ndarray]:
    """Pieces of one row."""
    room = length
    while room:
        piece = pieces.take(room)
        yield piece
        room -= len(piece) - 1


def tails(texts: Sequence[np.ndarray], length: int, count: int) -> list[np.ndarray]:
    """Up to `count` stretches of length + 1 tokens; documents are joined where they are shorter."""
    whole = np.concatenate(texts) if texts else np.zeros(0, np.int32)
    return [whole[i : i + length + 1] for i in range(0, len(whole) - length, length)][:count]
