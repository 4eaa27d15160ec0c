"""Reading and writing safetensors files: 8 bytes of header length, a JSON header, then the tensors'
bytes without holes.

The header is checked completely before any tensor is touched, and tensors are views of the mapped
file, so a checkpoint larger than memory can be read slice by slice. bfloat16 comes from ml_dtypes:
torch is not needed.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import ml_dtypes
import msgspec
import numpy as np
from msgspec import Meta

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import open_file

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
SPELLED: dict[np.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
HEADER_BYTES = 16 << 20  # of a file's header: about 100,000 tensors
_LARGEST = 1 << 48  # numbers in a tensor
_Whole = Annotated[int, Meta(ge=0, le=1 << 52)]
_AGAIN = "download or copy the file again"


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where it lies, counted from the end of the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A mapped safetensors file.

    Attributes:
      entries: name -> Entry, in the order of the bytes.
      metadata: the file's own string -> string dictionary.

    Raises:
      InfiniteVLError: not a safetensors file, truncated, or a header that contradicts itself.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.entries, self.metadata, self._start = _read_header(self.path)
        self._bytes = None

    def array(self, name: str) -> np.ndarray:
        """A read-only view of a tensor in the mapped file; no bytes are read yet."""
        entry = self.entries[name]
        if self._bytes is None:
            self._bytes = np.memmap(self.path, mode="r", dtype=np.uint8)
        flat = self._bytes[self._start + entry.begin : self._start + entry.end]
        return np.asarray(flat).view(entry.dtype).reshape(entry.shape)


class _HeaderEntry(msgspec.Struct):
    """A tensor in the header."""

    dtype: str
    shape: Annotated[list[_Whole], Meta(max_length=16)]
    data_offsets: tuple[_Whole, _Whole]


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str], int]:
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = int.from_bytes(head, "little") if len(head) == 8 else 0
        if head[:2] == b"PK" or head[:4] == b"\x80\x02\x8a\n":
            raise InfiniteVLError(
                f"{path} is a torch file, not safetensors",
                "name it pytorch_model.bin and install torch to import it",
            )
        if head == b"version ":
            raise InfiniteVLError(
                f"{path} is a git-lfs pointer, not the weights", "run `git lfs pull` in its folder"
            )
        if len(head) < 8:
            raise InfiniteVLError(
                f"{path} is {size} bytes long: truncated, or not a safetensors file", _AGAIN
            )
        if length > size - 8:
            raise InfiniteVLError(
                f"{path} says its header is {length:,} bytes long, the file has {size:,}:"
                " truncated, or not a safetensors file",
                _AGAIN,
            )
        if length > HEADER_BYTES:
            raise InfiniteVLError(
                f"{path} has a header of {length:,} bytes, more than the {HEADER_BYTES:,} that are"
                " read",
                "save the weights in several files",
            )
        raw = file.read(length)

    try:
        msgspec.json.decode(raw)  # strict: no NaN, no half of a surrogate pair
        header = json.loads(raw, object_pairs_hook=_unique)
    except InfiniteVLError as error:
        raise InfiniteVLError(f"{path}: {error.culprit}", _AGAIN) from None
    except (msgspec.DecodeError, ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise InfiniteVLError(
            f"{path}: the header is not a JSON object; not a safetensors file", _AGAIN
        )
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # some writers have null
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InfiniteVLError(f"{path}: __metadata__ does not map strings to strings", _AGAIN)
    found = {name: _entry(path, name, fields) for name, fields in header.items()}
    entries = dict(sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)))

    place, before = 0, "the header"
    for name, entry in entries.items():
        if entry.begin != place:
            what = "overlaps" if entry.begin < place else "leaves a hole behind"
            raise InfiniteVLError(
                f"{path}: tensor {name} at byte {entry.begin:,} {what} {before}, which ends at"
                f" {place:,}",
                _AGAIN,
            )
        place, before = entry.end, name
    if 8 + length + place != size:
        kind = "truncated" if size < 8 + length + place else "with bytes that belong to no tensor"
        raise InfiniteVLError(
            f"{path} is {size:,} bytes long, its header asks for {8 + length + place:,}: {kind}",
            _AGAIN,
        )
    return entries, metadata, 8 + length


def _unique(pairs: list) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice = next(
            name for name, times in Counter(name for name, _ in pairs).items() if times > 1
        )
        raise InfiniteVLError(f"{twice} stands twice in the header", "")
    return out


def _entry(path: Path, name: str, fields: Any) -> Entry:
    try:
        entry = msgspec.convert(fields, _HeaderEntry)
    except msgspec.ValidationError as error:
        raise InfiniteVLError(
            f"{path}: the header's entry for {name} is damaged: {error}", _AGAIN
        ) from None
    dtype, shape, (begin, end) = entry.dtype, tuple(entry.shape), entry.data_offsets
    if dtype not in DTYPES:
        raise InfiniteVLError(
            f"{path}: tensor {name} has the unknown dtype {dtype!r}",
            "save the weights in bf16, f16 or f32",
        )
    # Without its zeros too: numpy cannot say the shape of nothing that would be this large.
    if math.prod(shape) > _LARGEST or math.prod(n for n in shape if n) > _LARGEST:
        raise InfiniteVLError(
            f"{path}: tensor {name} has the impossible shape {list(shape)}", _AGAIN
        )
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise InfiniteVLError(
            f"{path}: tensor {name} {dtype} {list(shape)} takes"
            f" {math.prod(shape) * DTYPES[dtype].itemsize:,} bytes, its offsets span"
            f" {end - begin:,}",
            _AGAIN,
        )
    return Entry(DTYPES[dtype], shape, begin, end)


class SafetensorsWriter:
    """Writes a safetensors file whose tensors arrive in any order.

    Args:
      path: the file, which must not exist.
      tensors: (name, dtype, shape) in the order of the bytes.
      metadata: the file's own dictionary.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ):
        header: dict = {"__metadata__": dict(metadata)} if metadata else {}
        self.entries, place = {}, 0
        for name, dtype, shape in tensors:
            end = place + math.prod(shape) * dtype.itemsize
            self.entries[name] = Entry(dtype, tuple(shape), place, end)
            header[name] = {
                "dtype": SPELLED[dtype],
                "shape": list(shape),
                "data_offsets": [place, end],
            }
            place = end
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._start = 8 + len(raw)
        self._waiting = set(self.entries)
        self.path = path
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self._write(len(raw).to_bytes(8, "little") + raw, 0)

    def put(self, name: str, value: np.ndarray) -> None:
        """Write one tensor; `value` has its dtype and shape."""
        entry = self.entries[name]
        if (value.dtype, value.shape) != (entry.dtype, entry.shape) or name not in self._waiting:
            raise ValueError(
                f"{name}: {value.dtype} {value.shape} is not the {entry} that was announced, or"
                " came twice"
            )
        self._write(
            np.ascontiguousarray(value).reshape(-1).view(np.uint8).data, self._start + entry.begin
        )
        self._waiting.discard(name)

    def close(self) -> None:
        """Flush to disk. Every announced tensor must have come."""
        os.fsync(self._file)
        self.abort()
        if self._waiting:
            raise ValueError(f"{self.path}: never written: {sorted(self._waiting)[:3]}")

    def abort(self) -> None:
        """Close the file, complete or not."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, data, place: int) -> None:
        data = memoryview(data)
        while data:
            written = os.pwrite(self._file, data[: 1 << 30], place)
            data, place = data[written:], place + written
