"""Sources of images and videos: a path, a file:// or data: URL, or bytes.

A source is opened as a single file. It is never interpreted as a pattern, protocol or address.
"""

import base64
import io
import os
import re
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from PIL import Image

from infinitevl_jax import reading
from infinitevl_jax.errors import InfiniteVLError

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DATA = re.compile(r"data:([^,]*),", re.IGNORECASE)
_STILL_BRANDS = (b"avif", b"heic", b"heix", b"heim", b"heis", b"mif1", b"jxl ")
OTHER = {
    "image": 'pass it as an image: {"type": "image", "image": ...}, or --image on the command line',
    "video": 'pass it as a video: {"type": "video", "video": ...}, or --video on the command line',
}


def describe(source: object) -> str:
    """Short description of a source for errors: the path, or the kind and size."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        return f"data URI ({len(source):,} characters)"
    if isinstance(source, str | Path):
        text = str(source)
        return repr(text if len(text) <= 160 else text[:80] + "..." + text[-77:])
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{len(source):,} bytes in memory"
    if isinstance(source, Image.Image):
        return f"PIL image {source.width} x {source.height} mode {source.mode}"
    shape, dtype = (getattr(source, name, None) for name in ("shape", "dtype"))
    if shape is not None and dtype is not None:
        return f"array of shape {tuple(shape)} and type {dtype}"
    if isinstance(source, list | tuple):
        return f"list of {len(source):,} frames"
    return f"an object of type {type(source).__name__}"


def open_source(
    source: str | Path | bytes | bytearray | memoryview, name: str, noun: str
) -> BinaryIO:
    """Open an image or video for reading and seeking. The caller closes it.

    Args:
      source: a string is a data: or file:// URL, or else a path.
      name: name of the source, for errors.
      noun: "image" or "video".

    Raises:
      InfiniteVLError: a web address; not a regular file; empty or unreadable.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise InfiniteVLError(
                f"{name} has zero bytes", f"pass the whole {noun} file's contents"
            )
        return io.BytesIO(source)
    if isinstance(source, str):
        if data := _DATA.match(source):
            return open_source(_data(data[1], source[data.end() :], name, noun), name, noun)
        if address := _ADDRESS.match(source):
            source = _local(source, address[1].lower(), name)
    path = Path(source)
    try:
        if path.is_dir():
            frames = " (or a list of frames)" if noun == "video" else ""
            raise InfiniteVLError(f"{name} is a folder", f"pass one {noun} file{frames}")
        file = reading.open_regular(path)
    except InfiniteVLError:
        raise
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = (
            "does not exist"
            if missing
            else f"cannot be read: {getattr(error, 'strerror', None) or error}"
        )
        raise InfiniteVLError(
            f"{name} {reason}", f"check the path (working folder: {Path.cwd()})"
        ) from None
    if not os.fstat(file.fileno()).st_size:
        file.close()
        raise InfiniteVLError(
            f"{name} is an empty file (0 bytes)", f"copy or download the {noun} again"
        )
    return file


def _local(address: str, scheme: str, name: str) -> str:
    """Path of a local file:// URL. Raises InfiniteVLError for other addresses."""
    if scheme != "file":
        raise InfiniteVLError(
            f"{name} is a web address ({scheme})",
            "nothing is downloaded here: fetch the file first and pass its path or bytes",
        )
    parts = urlsplit(address, allow_fragments=False)
    if parts.netloc not in ("", "localhost"):
        raise InfiniteVLError(
            f"{name} is a file of another machine, {parts.netloc!r}",
            "copy it here and pass its path",
        )
    return unquote(parts.path + (f"?{parts.query}" if parts.query else ""))


def _data(header: str, content: str, name: str, noun: str) -> bytes:
    """Decode a data: URL as browsers do.

    Base64 may have line breaks, percent-encoding, the URL-safe alphabet or no padding.
    """
    try:
        if header.rpartition(";")[2].strip().lower() != "base64":
            return unquote_to_bytes(content)
        letters = (
            re.sub(r"[ \t\r\n\f]", "", unquote(content))
            .rstrip("=")
            .translate({ord("-"): "+", ord("_"): "/"})
        )
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except ValueError as error:  # not base64, or not ASCII
        raise InfiniteVLError(
            f"{name} is not valid base64: {error}", f"use data:{noun}/...;base64,<contents>"
        ) from None


def kind_of(head: bytes) -> str | None:
    """Kind of a file by its first 400 bytes: "image", "video", "both" (GIF, PNG) or None."""
    if head[4:8] == b"ftyp":
        return "image" if head[8:12] in _STILL_BRANDS else "video"
    if head[:4] == b"RIFF":
        return {b"WEBP": "image", b"AVI ": "video"}.get(head[8:12])
    if head.startswith((b"GIF8", b"\x89PNG")):
        return "both"
    if head.startswith(
        (
            b"\xff\xd8\xff",
            b"BM",
            b"II*\0",
            b"MM\0*",
            b"qoif",
            b"\0\0\0\x0cjP",
            b"%!PS",
            b"%PDF",
            b"<svg",
        )
    ):
        return "image"
    films = (
        b"\x1a\x45\xdf\xa3",
        b"FLV\x01",
        b"OggS",
        b"\x30\x26\xb2\x75",
        b"\0\0\x01\xba",
        b"\0\0\x01\xb3",
        b"DKIF",
    )
    if head.startswith(films) or head[4:8] in (b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "video"
    # packets of an MPEG transport stream
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return "video"
    return None
