"""The size of a video file according to its own structure.

Decoders take a truncated file for a shorter video.
"""

import os
import struct
from typing import BinaryIO

_BOXES = (
    b"ftyp",
    b"moov",
    b"mdat",
    b"moof",
    b"mfra",
    b"sidx",
    b"styp",
    b"free",
    b"skip",
    b"wide",
    b"uuid",
    b"meta",
    b"udta",
)
_MOST_PARTS = 1_000_000  # largest number of boxes or tags to read
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
# file properties: object size, id, bytes of the file
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")


def stated_size(file: BinaryIO) -> int | None:
    """Smallest size in bytes that a video file states; None if unknown.

    Supported are MP4 and MOV (boxes), Matroska and WebM (segment), AVI (RIFF), FLV (tags), MPEG
    transport streams (whole packets), Ogg (pages), ASF (file properties), GIF (trailer) and APNG
    (chunks). Raw streams and MPEG program streams state none.
    """
    size = file.seek(0, os.SEEK_END)
    head = _read(file, 0, 1024)
    try:
        if head[4:8] in _BOXES:
            return _boxes(file, size)
        if head[:4] == b"RIFF":
            return _riff(file, size)
        if head.startswith(b"\x1a\x45\xdf\xa3"):
            return _segment(head)
        if head.startswith(b"FLV"):
            return _flv(file, size)
        if head.startswith(b"OggS"):
            return _ogg(file, size)
        if head.startswith(_ASF_HEADER):
            return _asf(_read(file, 0, 1 << 16))
        if head.startswith(b"GIF8"):
            return (
                size
                if _read(file, max(0, size - 64), 64).rstrip(b"\0").endswith(b";")
                else size + 1
            )
        if head.startswith(b"\x89PNG"):
            return _png(file)
        for packet, at in ((188, 0), (192, 4), (204, 0)):
            if (
                len(head) > at + 2 * packet
                and head[at] == head[at + packet] == head[at + 2 * packet] == 0x47
            ):
                return -(-size // packet) * packet
    except (struct.error, IndexError):  # a truncated header
        return size + 1
    return None


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _boxes(file: BinaryIO, size: int) -> int | None:
    at = 0
    for _ in range(_MOST_PARTS):
        if at >= size:
            return at
        head = _read(file, at, 16)
        length, kind = struct.unpack_from(">I4s", head)
        length = struct.unpack_from(">Q", head, 8)[0] if length == 1 else length
        if kind not in _BOXES or length < 8:  # a box to the end, or other data after the boxes
            return None
        at += length
    return None


def _riff(file: BinaryIO, size: int) -> int | None:
    at = length = 0
    while at < size:  # a large AVI has several chunks
        kind, length = struct.unpack("<4sI", _read(file, at, 8))
        if kind != b"RIFF" or length in (0, 0xFFFFFFFF):
            return None
        at += 8 + length + length % 2
    return at - length % 2


def _segment(head: bytes) -> int | None:
    at = 4
    length, at = _ebml_number(head, at)
    at += length  # the EBML header
    if head[at : at + 4] != b"\x18\x53\x80\x67":
        return None
    length, start = _ebml_number(head, at + 4)
    unknown = length == (1 << 7 * (start - at - 4)) - 1
    return None if unknown else start + length


def _ebml_number(data: bytes, at: int) -> tuple[int, int]:
    """Read an EBML number of 1 to 8 bytes. Returns the number and the position after it."""
    count = 9 - data[at].bit_length()
    field = data[at : at + count]
    if count > 8 or len(field) < count:
        raise IndexError
    return int.from_bytes(field) - (1 << 7 * count), at + count


def _flv(file: BinaryIO, size: int) -> int | None:
    at = int.from_bytes(_read(file, 5, 4)) + 4
    end = at
    for _ in range(_MOST_PARTS):
        if at >= size:
            return end
        head = _read(file, at, 4)
        if head[0] not in (8, 9, 18):
            return None
        end = at + 11 + int.from_bytes(head[1:4])
        at = end + 4  # a tag is followed by its size, which some writers omit at the end
    return None


def _ogg(file: BinaryIO, size: int) -> int | None:
    start = max(0, size - (1 << 17))
    tail = _read(file, start, 1 << 17)
    at = tail.rfind(b"OggS")
    if at < 0:
        return None
    segments = tail[at + 26]
    table = tail[at + 27 : at + 27 + segments]
    return start + at + 27 + segments + sum(table) + (len(table) < segments)


def _png(file: BinaryIO) -> int | None:
    at = 8
    for _ in range(_MOST_PARTS):
        length, kind = struct.unpack(">I4s", _read(file, at, 8))
        at += 12 + length  # a chunk ends with four bytes of checksum
        if kind == b"IEND":
            return at
    return None


def _asf(head: bytes) -> int | None:
    at = head.find(_ASF_FILE)
    return (struct.unpack_from("<Q", head, at + 40)[0] or None) if at >= 0 else None
