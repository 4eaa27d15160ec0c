"""Checksums of stored arrays: CRC-32 of their bytes, in FOLDER/checksums/NAME.PROCESS.json.

A process records the parts that it wrote: whole arrays, or the shards that it holds of arrays that
are spread over several processes.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import jax
import msgspec
import numpy as np

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import read_json

FOLDER = "checksums"
_Size = Annotated[int, msgspec.Meta(ge=0)]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A box of an array, and the CRC-32 of its bytes in C order."""

    start: tuple[_Size, ...]
    shape: tuple[_Size, ...]
    crc32: _Size


def parts_of(value: np.ndarray | jax.Array) -> list[Part]:
    """The parts of an array that this process writes."""
    if isinstance(value, np.ndarray):
        if jax.process_index():  # the first process writes it
            return []
        return [Part((0,) * value.ndim, value.shape, _crc32(value))]
    return [
        Part(tuple(i.start or 0 for i in shard.index), shard.data.shape, _crc32(shard.data))
        for shard in value.addressable_shards
        if shard.replica_id == 0
    ]


def write_checksums(folder: Path, name: str, parts: Mapping[str, Sequence[Part]]) -> None:
    """Write those of this process: array name -> its parts."""
    (folder / FOLDER).mkdir(exist_ok=True)
    path = folder / FOLDER / f"{name}.{jax.process_index()}.json"
    path.write_bytes(msgspec.json.encode(parts) + b"\n")


def checksum_files(folder: Path, name: str) -> list[Path]:
    """Those of all processes."""
    return sorted((folder / FOLDER).glob(f"{name}.*.json"))


def read_checksums(folder: Path, name: str) -> dict[str, list[Part]]:
    """Array name -> its parts, of all processes. Raises InfiniteVLError where there are none."""
    files = checksum_files(folder, name)
    if not files:
        raise InfiniteVLError(
            f"{folder} has no {FOLDER}/{name}.0.json",
            "the checkpoint is damaged: copy or import it again",
        )
    found: dict[str, list[Part]] = {}
    for path in files:
        for array, parts in read_json(path, dict[str, list[Part]]).items():
            found.setdefault(array, []).extend(parts)
    return found


def is_intact(value: np.ndarray, start: Sequence[int], parts: Sequence[Part]) -> bool:
    """Whether all parts that lie wholly in `value`, which begins at `start` of its array, have the
    bytes that were written."""
    return all(_crc32(value[box]) == part.crc32 for box, part in _within(value, start, parts))


def _within(
    value: np.ndarray, start: Sequence[int], parts: Sequence[Part]
) -> Iterator[tuple[tuple[slice, ...], Part]]:
    for part in parts:
        begin = [a - b for a, b in zip(part.start, start, strict=True)]
        end = [a + b for a, b in zip(begin, part.shape, strict=True)]
        if all(a >= 0 for a in begin) and all(
            b <= size for b, size in zip(end, value.shape, strict=True)
        ):
            yield tuple(map(slice, begin, end)), part


def _crc32(value: np.ndarray | jax.Array) -> int:
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
