"""Documents for language-model training: text files, folders of them, .xz, or rows with `text`."""

import functools
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation
from infinitevl_jax.data.media import Media
from infinitevl_jax.data.records import READERS
from infinitevl_jax.data.sources import Source, register_source
from infinitevl_jax.data.sources.files import open_rows, options
from infinitevl_jax.data.splits import select_rows
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.reading import open_file

UNPACKED = 1 << 30  # largest .xz file in bytes, unpacked; it is kept in memory


class Options(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Options of texts.

    Attributes:
      chunk: bytes of a document that are read at a time and form a row. Rows end at line breaks.
      suffixes: of the files of a folder that are read; none = all.
    """

    chunk: Annotated[int, Meta(ge=64, le=1 << 26)] = 1 << 16
    suffixes: list[str] = []


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

    def __init__(self, title: str, chunks: Sequence[Chunk], rows: Sequence[int]):
        self.title, self.chunks, self.rows = title, chunks, rows

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, number: int) -> int:
        """Number of a chunk among those of all files."""
        return int(self.rows[range(len(self))[number]])

    def __getitem__(self, number: int) -> Conversation:
        number = self.record(number)
        chunk = self.chunks[number]
        try:
            content, complete = _read(chunk)
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
    chunks = []
    for file in files:
        size = _size(file)
        chunks += [
            Chunk(file, at, min(at + chosen.chunk, size), chosen.chunk)
            for at in range(0, size, chosen.chunk)
        ]
    if not chunks:
        raise InfiniteVLError(f"{path} holds no text", "name a text file, or a folder of them")
    return Texts(str(path), chunks, select_rows(split, len(chunks), str(path)))


def _document(row: Row, media: Media) -> Conversation:
    return Conversation(text=row.text)


def _size(file: Path) -> int:
    if file.suffix == ".xz":
        return len(_unpacked(file))
    with open_file(file) as opened:
        return os.fstat(opened.fileno()).st_size


def _read(chunk: Chunk) -> tuple[bytes, bool]:
    """A chunk's lines, and whether the document ends with them.

    A line belongs to the chunk in which it begins. A line that goes on for more than half of a
    chunk is divided, between characters.
    """
    width = chunk.width
    if chunk.file.suffix == ".xz":
        whole = _unpacked(chunk.file)
        size, first = len(whole), max(chunk.start - width, 0)
        text = whole[first : chunk.stop + width]
    else:
        with open_file(chunk.file) as file:
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


@functools.lru_cache(maxsize=8)
def _unpacked(file: Path) -> bytes:
    with open_file(file) as packed:
        unpacker = lzma.LZMAFile(packed)
        try:
            content = unpacker.read(UNPACKED + 1)
        except (lzma.LZMAError, EOFError) as error:
            raise InfiniteVLError(
                f"{file} is not a whole .xz file: {error}", "copy it again"
            ) from None
    if len(content) > UNPACKED:
        raise InfiniteVLError(
            f"{file} has more than {UNPACKED:,} bytes unpacked", "unpack it: xz -d"
        )
    return content


register_source("text", open_text)
