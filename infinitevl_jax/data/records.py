"""Records of JSON, JSONL and parquet files by number, without the whole file in memory."""

import json
import os
import re
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import convert, decode_json, open_file

RECORD_BYTES = 64 << 20  # largest record; base64 images may be in it
WINDOW = 4 << 20  # bytes of a file that are looked at in one go
_BLANK = re.compile(r"[ \t\r\n]*")

T = TypeVar("T")


class Records(Protocol):
    """Records of a file."""

    def __len__(self) -> int: ...

    def read(self, number: int, kind: type[T]) -> T:
        """Record `number` as a value of type `kind`.

        Raises:
          InfiniteVLError: it cannot be read, or has another type.
        """
        ...


class JsonRecords:
    """Objects of a JSON array or of the lines of a JSONL file, found by their place in the file."""

    def __init__(self, path: Path):
        """Find the records: one pass over the file.

        Raises:
          InfiniteVLError: the file cannot be read, is empty, or is neither an array nor lines.
        """
        self.path = path
        self._file: int | None = None
        with open_file(path) as file:
            first = file.read(WINDOW).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
            if not first:
                raise InfiniteVLError(f"{path} is empty", "put the rows into it")
            file.seek(0)
            places = array("q")
            for place in (_array_items if first == b"[" else _lines)(file, path):
                places.extend(place)
        self.places = np.frombuffer(places, np.int64).reshape(-1, 2)
        if not len(self.places):
            raise InfiniteVLError(f"{path} has no rows", "put the rows into it")

    def __len__(self) -> int:
        return len(self.places)

    def __reduce__(self) -> tuple:
        return _restored, (self.path, self.places)

    def read(self, number: int, kind: type[T]) -> T:
        start, stop = (int(place) for place in self.places[number])
        if stop - start > RECORD_BYTES:
            raise InfiniteVLError(
                f"it has {stop - start:,} bytes, more than {RECORD_BYTES:,}",
                "store images in files, not in the row",
            )
        return decode_json(os.pread(self._descriptor(), stop - start, start), kind, "the record")

    def _descriptor(self) -> int:
        if self._file is None:  # each process opens it for itself
            with open_file(self.path) as file:
                self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
        return self._file


def _restored(path: Path, places: np.ndarray) -> JsonRecords:
    records = JsonRecords.__new__(JsonRecords)
    records.path, records.places, records._file = path, places, None
    return records


def _lines(file, path: Path) -> Iterator[tuple[int, int]]:
    """First byte and byte behind the last of each line that is not blank."""
    start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
    base, last = file.seek(0), b""
    while chunk := file.read(WINDOW):
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + base
        for end in ends.tolist():
            width = end - start
            if width == 1:
                width -= (chunk[start - base : end - base] if start >= base else last) == b"\r"
            if width:
                yield start, end
            start = end + 1
        base, last = base + len(chunk), chunk[-1:]
    if base > start:
        yield start, base


def _array_items(file, path: Path) -> Iterator[tuple[int, int]]:
    """First byte and byte behind the last of each item of a JSON array.

    The text is taken for Latin-1, one byte a character: JSON's own characters are ASCII.
    """
    decoder = json.JSONDecoder(strict=False)
    text, base, at, ended, wanted = "", 0, 0, False, WINDOW

    def more() -> None:
        nonlocal text, base, at, ended
        chunk = file.read(wanted).decode("latin-1")
        ended = not chunk
        text, base, at = text[at:] + chunk, base + at, 0

    def skip() -> str:
        """The next character behind blanks; "" at the end of the file."""
        nonlocal at
        while True:
            found = _BLANK.match(text, at)
            at = found.end() if found else at
            if at < len(text) or ended:
                return text[at : at + 1]
            more()

    def wrong(reason: str) -> InfiniteVLError:
        return InfiniteVLError(
            f"{path} is not a JSON array of rows: {reason} at byte {base + at:,}",
            "write the file again, or one row a line (JSONL), where a broken row is skipped",
        )

    if skip() == "\xef":
        at += 3
    if skip() != "[":
        raise wrong("no [")
    at += 1
    first = True
    while (character := skip()) != "]":
        if not first:
            if character != ",":
                raise wrong("no comma between rows" if character else "the end is missing")
            at += 1
            skip()
        while True:
            try:
                _, end = decoder.raw_decode(text, at)
                break
            except (json.JSONDecodeError, RecursionError) as error:
                if ended or len(text) - at > RECORD_BYTES or isinstance(error, RecursionError):
                    raise wrong(f"a row that cannot be read ({error})") from None
                more()
                wanted *= 2
        yield base + at, base + end
        at, first, wanted = end, False, WINDOW
    at += 1
    if skip():
        raise wrong("something after the last row")


class ParquetRecords:
    """Rows of a parquet file, or of all in a folder. The last row groups read are kept."""

    KEPT = 4

    def __init__(self, path: Path):
        """Read the files' footers.

        Raises:
          InfiniteVLError: pyarrow is not installed, or a file is not parquet.
        """
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        self.path, self._groups = path, []  # (file, row group)
        self.columns: set[str] = set()
        counts = []
        for file in files:
            opened = _parquet(file)
            self.columns |= set(opened.schema_arrow.names)
            footer = opened.metadata
            for group in range(footer.num_row_groups):
                self._groups.append((file, group))
                counts.append(footer.row_group(group).num_rows)
        self._ends = np.cumsum(np.asarray(counts, np.int64))
        if not len(self):
            raise InfiniteVLError(f"{path} has no rows", "put the rows into it")
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_kept": {}}

    def read(self, number: int, kind: type[T]) -> T:
        group = int(np.searchsorted(self._ends, number, "right"))
        table = self._kept.get(group)
        if table is None:
            file, index = self._groups[group]
            try:
                table = _parquet(file).read_row_group(index)
            except Exception as error:  # of pyarrow, for damaged pages
                raise InfiniteVLError(
                    f"it cannot be read: {str(error)[:200]}", f"copy {file} again"
                ) from None
            while len(self._kept) >= self.KEPT:
                self._kept.pop(next(iter(self._kept)), None)
            self._kept[group] = table
        first = int(self._ends[group]) - table.num_rows
        return convert(table.slice(number - first, 1).to_pylist()[0], kind, "the record")


def _parquet(file: Path) -> Any:
    from infinitevl_jax.extras import says_which_extra

    with says_which_extra():
        import pyarrow.parquet
    with open_file(file):  # a clear error where there is none
        pass
    try:
        return pyarrow.parquet.ParquetFile(file)
    except Exception as error:  # of pyarrow
        raise InfiniteVLError(
            f"{file} is not a parquet file: {str(error)[:200]}", "copy it again"
        ) from None


READERS: dict[str, Callable[[Path], Records]] = {
    ".json": JsonRecords,
    ".jsonl": JsonRecords,
    ".ndjson": JsonRecords,
    ".parquet": ParquetRecords,
}


def open_records(path: Path) -> Records:
    """The records of a file, or of a folder of parquet files.

    Raises:
      InfiniteVLError: nothing is there, or its suffix is unknown.
    """
    if path.is_dir():
        if not any(path.glob("*.parquet")):
            raise InfiniteVLError(
                f"{path} is a folder without parquet files", "name the file that holds the rows"
            )
        return ParquetRecords(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InfiniteVLError(
            f"{path} has the unknown suffix {path.suffix!r}", f"rows lie in {', '.join(READERS)}"
        )
    return reader(path)


def keys_of(records: Records, count: int = 64) -> set[str]:
    """Keys of `count` records, from the first to the last; those that cannot be read are left out.

    Parquet tells the keys of all records."""
    if isinstance(records, ParquetRecords):
        return records.columns
    found: set[str] = set()
    for number in np.linspace(0, len(records) - 1, min(count, len(records)), dtype=int):
        try:
            found |= set(records.read(int(number), dict[str, Any]))
        except InfiniteVLError:
            continue
    return found
