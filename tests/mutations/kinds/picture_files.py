"""Bytes of picture files: of many formats, of formats that are none, and of very many pixels."""

import functools
import io
import zlib

import numpy as np
from PIL import Image

from .processors import picture

FORMATS = [("PNG", m) for m in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")] + [
    ("JPEG", m) for m in ("RGB", "L", "CMYK")
]
FORMATS += [
    ("GIF", "P"),
    ("BMP", "RGB"),
    ("WEBP", "RGB"),
    ("WEBP", "RGBA"),
    ("TIFF", "RGB"),
    ("TIFF", "I;16"),
    ("PPM", "RGB"),
    ("ICO", "RGBA"),
]
FORMATS += [
    ("TGA", "RGB"),
    ("JPEG2000", "RGB"),
    ("PCX", "RGB"),
    ("TIFF", "F"),
    ("AVIF", "RGB"),
    ("DDS", "RGBA"),
    ("SGI", "RGB"),
]
PROGRAMS = [
    "EPS",
    "PDF",
    "WMF",
    "FITS",
    "HDF5",
    "GRIB",
    "BUFR",
    "MPEG",
]  # formats that start programs, or that are no pictures


def encoded(kind: str, mode: str, orientation: int = 1) -> bytes:
    """A small picture as a file's bytes."""
    image, file = picture(40, 24), io.BytesIO()
    if mode.startswith(("I", "F")):
        grey = np.asarray(image.convert("L"))
        image = (
            Image.fromarray(grey.astype(np.float32))
            if mode == "F"
            else Image.fromarray(grey.astype(np.uint16) * 256)
        )
        image = image.convert("I") if mode == "I" else image
    elif mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    else:
        image = image.convert(mode)
    how = (
        {"exif": exif(orientation)}
        if kind in ("JPEG", "PNG", "WEBP", "TIFF") and orientation > 1
        else {}
    )
    image.save(file, kind, **how)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def hostile(kind: str) -> bytes:
    """Bytes of a format that nobody should open as a picture."""
    if kind in ("EPS", "PDF"):
        file = io.BytesIO()
        picture().save(file, kind)
        return file.getvalue()
    heads = {
        "WMF": b"\xd7\xcd\xc6\x9a",
        "FITS": b"SIMPLE  =" + b" " * 71,
        "HDF5": b"\x89HDF\r\n\x1a\n",
        "GRIB": b"GRIB\0\0\0\2",
        "BUFR": b"BUFR\0\0\0\4",
    }
    return heads.get(kind, b"\0\0\1\xb3") + b"\0" * 4000


BOMBS = [
    (9000, 6),
    (9000, 4),
    (13_300, 0),
    (30_000, 2),
    (2**31 - 1, 2),
    (1, 2),
]  # side, PNG's colour type


@functools.cache
def bomb(side: int, colour: int, text: bool) -> bytes:
    """A few bytes that say, or unfold to, very many black pixels, or to a long text beside them."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        )

    depth = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    squeeze = zlib.compressobj(9)
    row = b"\0" + bytes(side * depth) if side < 20_000 else b""
    data = b"".join(squeeze.compress(row) for _ in range(side if row else 0)) + squeeze.flush()
    head = side.to_bytes(4, "big") * 2 + bytes([8, colour, 0, 0, 0])
    more = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 26))) if text else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + more
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )
