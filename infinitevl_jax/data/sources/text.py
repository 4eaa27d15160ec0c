"""Documents for language-model training: text files, folders of them, .xz, or rows with `text`."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

import msgspec
from msgspec import Meta

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation
from infinitevl_jax.data.media import Media
from infinitevl_jax.data.records import READERS
from infinitevl_jax.data.sources import Source, register_source
from infinitevl_jax.data.sources.files import open_rows, options
from infinitevl_jax.data.splits import select_rows
from infinitevl_jax.data.unpacked import Unpacked, unpack
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.reading import open_file


class Options(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Options of texts.

    Attributes:
      chunk: bytes of a document that are read at a time and form a row. Rows end at line breaks.
      suffixes: of the files of a folder that are read; none = all.
      whole: slices of `train` and `held_out` take whole files, in the order of a hash of their
        names. Otherwise they take rows, in the order of the names.
    """

    chunk: Annotated[int, Meta(ge=64, le=1 << 26)] = 1 << 16
    suffixes: list[str] = []
    whole: bool = False


class Row(msgspec.Struct):
    """A document. Other keys mean nothing."""

    text: str


class Chunk(NamedTuple):
    """Bytes `start` to `stop` of a file, before they are moved to line breaks."""

    file: Path
    start: int
    stop: int
    width: int  # bytes of all chunks of the file but its last


class Texts:
    """Chunks of text files, in the order of their names."""

    def __init__(
        self,
        title: str,
        chunks: Sequence[Chunk],
        rows: Sequence[int],
        unpacked: Mapping[Path, Unpacked],
    ):
        """
        Args:
          rows: numbers of the chunks that are the source's rows.
          unpacked: packed ones among the files.
        """
        self.title, self.chunks, self.rows, self.unpacked = title, chunks, rows, unpacked

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, number: int) -> int:
        """Number of a chunk among those of all files."""
        return int(self.rows[range(len(self))[number]])

    def __getitem__(self, number: int) -> Conversation:
        number = self.record(number)
        chunk = self.chunks[number]
        try:
            content, complete = _read(chunk, self.unpacked)
            return Conversation(text=content.decode("utf-8"), complete=complete)
        except UnicodeDecodeError as error:
            reason = f"{chunk.file} is not UTF-8 from byte {chunk.start:,}: {error.reason}"
            raise BadRow(self.title, number, reason, "write the file again as UTF-8") from error
        except InfiniteVLError as error:
            raise BadRow(self.title, number, error.culprit, error.cure) from error


def open_text(config: SourceConfig, split: str) -> Source:
    """Open text files. Every token bears loss."""
    path = Path(config.path)
    if path.suffix.lower() in READERS:
        return open_rows(config, split, Row, _document)
    chosen = options(config, Options)
    files = [path]
    if path.is_dir():
        suffixes = tuple(chosen.suffixes)
        files = sorted(
            p
            for p in path.rglob("*")
            if p.is_file() and not p.name.startswith(".") and p.name.endswith(suffixes or "")
        )
    if chosen.whole and files:
        files.sort(key=lambda file: hashlib.sha256(str(file.relative_to(path)).encode()).digest())
        files = [files[number] for number in select_rows(split, len(files), str(path))]
    unpacked = {file: unpack(file) for file in files if file.suffix.lower() == ".xz"}
    chunks = []
    for file in files:
        with _opened(file, unpacked) as opened:
            size = os.fstat(opened.fileno()).st_size
        chunks += [
            Chunk(file, at, min(at + chosen.chunk, size), chosen.chunk)
            for at in range(0, size, chosen.chunk)
        ]
        if size > chosen.chunk and not _read(chunks[-1], unpacked)[0]:
            chunks.pop()  # no line begins in it
    if not chunks:
        raise InfiniteVLError(f"{path} holds no text", "name a text file, or a folder of them")
    rows = range(len(chunks))
    if not chosen.whole:
        rows = select_rows(split, len(chunks), str(path))
    return Texts(str(path), chunks, rows, unpacked)


def _document(row: Row, media: Media) -> Conversation:
    return Conversation(text=row.text)


def _opened(file: Path, unpacked: Mapping[Path, Unpacked]) -> BinaryIO:
    return open_file(unpacked[file].path if file in unpacked else file)


def _read(chunk: Chunk, unpacked: Mapping[Path, Unpacked]) -> tuple[bytes, bool]:
    """A chunk's lines, and whether the document ends with them.

    A line belongs to the chunk in which it begins. A line that goes on for more than half of a
    chunk is divided, between characters.
    """
    width = chunk.width
    with _opened(chunk.file, unpacked) as file:
        size = os.fstat(file.fileno()).st_size
        first = max(chunk.start - width, 0)
        file.seek(first)
        text = file.read(chunk.stop + width - first)
    start = _break(text, chunk.start - first, size - first, width)
    stop = _break(text, chunk.stop - first, size - first, width)
    return text[start:stop], first + stop >= size


def _break(text: bytes, at: int, size: int, width: int) -> int:
    """The first line that begins at `at` or soon behind it, else the first character."""
    if at <= 0 or at >= size:
        return max(0, min(at, size))
    found = text.find(b"\n", at - 1, at + width // 2 - 1)
    if found >= 0:
        return found + 1
    while at < len(text) and text[at] & 0xC0 == 0x80:  # inside a character
        at += 1
    return at


register_source("text", open_text)
