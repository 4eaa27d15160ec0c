"""Pictures: files of many formats, damaged.

What only looks like one; arrays and PIL images of every mode.
"""

import base64
import io
import os
from random import Random

import numpy as np
from PIL import Image

from infinitevl_jax.processing import ImageOptions, load_image
from infinitevl_jax.processing.images import process_image

from ..case import Case, Place, refused_only
from ..content import FOREIGN, mutate_bytes, mutate_text
from ..values import BAD
from .picture_files import BOMBS, FORMATS, PROGRAMS, bomb, encoded, hostile
from .processors import picture

BLACK_OR_WHITE = [((level, level),) * 3 for level in (0, 255)]
OPTIONS = ImageOptions(min_pixels=64, max_pixels=4096, patch_size=2)


def make(rng: Random, place: Place) -> Case:
    kind, mode = rng.choice(FORMATS)
    way = rng.choice(
        ["bytes"] * 8
        + [
            "whole",
            "turned",
            "turned",
            "hostile",
            "bomb",
            "path",
            "path",
            "uri",
            "array",
            "array",
            "pil",
            "value",
            "foreign",
        ]
    )
    data = encoded(kind, mode, rng.randrange(1, 9) if way == "turned" or rng.random() < 0.3 else 1)
    label = f"{kind} {mode}"
    if way == "bytes":
        data, done = mutate_bytes(rng, data, head=200)
        label += f": {done}"
    elif way == "hostile":
        label = rng.choice(PROGRAMS)
        return _refused(hostile(label), label, place, rng)
    elif way == "bomb":
        side, colour = rng.choice(BOMBS)
        unfolds = bomb(side, colour, rng.random() < 0.3)
        one = lambda found: "" if found[0].getextrema() in BLACK_OR_WHITE else "other pixels"  # noqa: E731
        return Case(f"a PNG of {side} x {side}, colour type {colour}", lambda: use(unfolds), one)
    elif way == "foreign":
        label = rng.choice(list(FOREIGN))
        return _refused(FOREIGN[label], label, place, rng)
    elif way in ("array", "pil", "value"):
        return _object(rng, way)
    elif way == "path":
        return _path(rng, place, data, label)
    elif way == "uri":
        text, done = mutate_text(
            rng, f"data:image/{kind.lower()};base64," + base64.b64encode(data).decode()
        )
        return Case(
            f"data URI, {label}: {done}",
            lambda: use(text),
            lambda found: check(found, base64.b64decode(text.partition(",")[2])),
        )
    source: object = data
    if rng.random() < 0.4:
        path = place.work / rng.choice(
            ["photo.png", "photo.jpg", "a:b%d?.png", "no suffix", "é\u202e.webp", "x.eps"]
        )
        path.write_bytes(data)
        source, label = (
            rng.choice([path, str(path), f"file://{path}".replace("%", "%25").replace("?", "%3F")]),
            f"{path.name!r}, {label}",
        )
    return Case(label, lambda: use(source), lambda found: check(found, data))


def use(source) -> tuple[Image.Image, np.ndarray, tuple]:
    image = load_image(source)
    return image, *process_image(image, OPTIONS)


def check(found: tuple, data: bytes) -> str:
    """The pixels that Pillow has, upright and laid over white."""
    image, patches, grid = found
    try:
        with Image.open(io.BytesIO(data)) as opened:
            wanted = plain(opened)
    except Exception as error:
        return f"accepted what Pillow refuses: {error}"
    if (
        image.mode != "RGB"
        or image.size != wanted.size
        or np.abs(np.asarray(image).astype(int) - np.asarray(wanted)).max() > 1
    ):
        return f"other pixels: {image.mode} {image.size} for {wanted.size}"
    return (
        ""
        if np.isfinite(patches).all() and len(patches) == grid[1] * grid[2]
        else "patches that are none"
    )


def plain(image: Image.Image) -> Image.Image:
    """An opened picture as upright RGB over white, written again."""
    image.load()
    turns = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 4,
        7: 6,
        8: 2,
    }  # EXIF's orientation -> Pillow's transposition
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:
        orientation = 1
    if orientation in turns:
        image = image.transpose([*Image.Transpose][turns[orientation]])
    if image.mode.startswith("I;16"):
        return Image.fromarray(
            (np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)
        ).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = (image.convert("RGBA" if image.mode != "La" else "LA")).convert("RGBA")
        alpha = np.asarray(image)[..., 3:].astype(np.float64) / 255
        return Image.fromarray(
            np.round(np.asarray(image)[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
        )
    return image.convert("RGB")


def _refused(data: bytes, label: str, place: Place, rng: Random) -> Case:
    path = place.work / rng.choice(["photo.jpg", "photo.png", f"x.{label.lower()[:4]}"])
    path.write_bytes(data)
    source = rng.choice([data, str(path)])
    return Case(f"{label} as a picture", lambda: use(source), refused_only(label))


def _path(rng: Random, place: Place, data: bytes, label: str) -> Case:
    """Paths at which no picture lies, or one that is reached in another way."""
    path = place.work / "photo.png"
    kind = rng.choice(
        [
            "absent",
            "folder",
            "pipe",
            "device",
            "link",
            "circle",
            "socket",
            "null",
            "long",
            "proc",
            "address",
            "empty",
        ]
    )
    made: object = path
    if kind == "link":
        (place.work / "true.png").write_bytes(data)
        path.symlink_to("true.png")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind != "absent":
        made = {
            "device": "/dev/zero",
            "socket": "/dev/log",
            "null": f"{path}\0",
            "long": "x" * 5000,
            "proc": "/proc/self/mem",
            "address": rng.choice(
                [
                    "http:/127.0.0.1:9/x.png",
                    "HTTP://127.0.0.1:9/x",
                    "ftp://x/y",
                    "file://host/x",
                    "s3://x",
                    "data:",
                    "file://",
                ]
            ),
        }[kind]
    source = str(made) if rng.random() < 0.5 or isinstance(made, str) else made
    checked = (lambda found: check(found, data)) if kind == "link" else refused_only(kind)
    return Case(
        f"a path: {kind} {made if isinstance(made, str) else ''}"[:80], lambda: use(source), checked
    )


def _object(rng: Random, way: str) -> Case:
    if way == "value":
        value = rng.choice([*BAD, object(), [picture()], {"url": "x"}, lambda: 1])
        return Case(f"value {value!r:.60}", lambda: use(value), refused_only(repr(value)[:60]))
    if way == "pil":
        mode = rng.choice(
            [
                "1",
                "L",
                "P",
                "RGB",
                "RGBA",
                "CMYK",
                "YCbCr",
                "LAB",
                "HSV",
                "I",
                "F",
                "LA",
                "PA",
                "RGBX",
                "RGBa",
                "La",
                "I;16",
                "I;16B",
                "I;16L",
            ]
        )
        size = rng.choice([(9, 7), (1, 1), (0, 5), (1, 300), (201, 1), (4000, 3000)])
        image = Image.new(
            mode,
            size,
            (
                rng.choice(
                    [0, 1, 7] if len(mode) < 3 and mode[0] in "1LPIF" and mode[1:2] != "a" else [0]
                )
                if "A" not in mode
                else 0
            ),
        )
        return Case(
            f"PIL {mode} {size}", lambda: use(image), lambda found: check_object(found, image)
        )
    shape = rng.choice(
        [
            (8, 9, 3),
            (8, 9, 4),
            (8, 9, 1),
            (8, 9),
            (3, 8, 9),
            (1, 8, 9, 3),
            (0, 9, 3),
            (),
            (8, 9, 0),
            (1, 1, 3),
            (2**20, 1, 3),
        ]
    )
    kind = rng.choice(
        [
            "uint8",
            "uint8",
            "float32",
            "int64",
            "bool",
            "object",
            "U1",
            "uint16",
            "complex64",
            "datetime64[s]",
        ]
    )
    array = np.zeros(shape, kind)
    good = (
        kind == "uint8"
        and len(shape) == 3
        and shape[-1] == 3
        and array.size
        and max(shape[:2]) <= 200 * min(shape[:2])
    )
    checked = (
        (lambda found: "" if np.asarray(found[0]).tolist() == array.tolist() else "other pixels")
        if good
        else refused_only(f"{kind} {shape}")
    )
    return Case(f"array {kind} {shape}", lambda: use(array), checked)


def check_object(found: tuple, image: Image.Image) -> str:
    if image.mode in ("I", "F") or 0 in image.size:
        return f"accepted {image.mode} {image.size}"
    wanted = np.asarray(plain(image.copy())).astype(int)
    got = np.asarray(found[0]).astype(int)
    return "" if got.shape == wanted.shape and np.abs(got - wanted).max() <= 1 else "other pixels"
