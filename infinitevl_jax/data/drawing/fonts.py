"""Fonts of a folder, by family, with some families held out."""

import functools
import random
import string
from collections.abc import Sequence
from pathlib import Path

from PIL import ImageFont

from infinitevl_jax.data.drawing.split import side
from infinitevl_jax.errors import InfiniteVLError

SUFFIXES = (".ttf", ".otf", ".woff", ".woff2")
CHARACTERS = string.ascii_letters + string.digits + "!#$%&'()+,-./:;?"  # that tasks write
NO_CHARACTER = "\U0010fffe"  # of which no font has a glyph
BASE = ("DejaVu Sans", "DejaVu Sans Mono", "DejaVu Serif", "STIXGeneral")  # matplotlib's own
PROBE = 100  # size in which fonts are measured
SMALLEST = 4  # height of a capital in pixels, below which nothing is written


class Fonts:
    """Fonts of one part of the data. It can be pickled: files are opened where they are used."""

    def __init__(self, families: dict[str, tuple[str, ...]]):
        """families: files of each family."""
        self.families = [families[name] for name in sorted(families)]
        self.names = sorted(families)

    def choose(self, rng: random.Random) -> str:
        """The file of a font. Families are equally likely."""
        return rng.choice(rng.choice(self.families))


def open_fonts(folder: str, part: str, share: float) -> Fonts:
    """Fonts of a folder and its subfolders.

    Args:
      folder: "" for the text fonts that come with matplotlib.
      part: "train" or "test".
      share: of the families that is held out for "test", at least one of several.

    Raises:
      InfiniteVLError: there is no font, or one cannot be read or lacks characters.
    """
    families = families_of(folder)
    own = side(families, part, share)
    if not own:
        raise InfiniteVLError(
            f"all fonts in {folder!r} are of the family {next(iter(families))}, so none is held"
            " out for the test split",
            "put fonts of another family into the folder",
        )
    return Fonts({name: families[name] for name in own})


@functools.cache
def families_of(folder: str) -> dict[str, tuple[str, ...]]:
    """Files of each family in a folder."""
    files = sorted(p for p in _folder(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    named = [(_open(str(file), PROBE).getname()[0] or file.stem, file) for file in files]
    if not folder:
        named = [(family, file) for family, file in named if family in BASE]
    if not named:
        raise InfiniteVLError(
            f"the folder of fonts {folder!r} has no {', '.join(SUFFIXES)}",
            'name a folder that holds fonts, or "" for those of matplotlib',
        )
    lacking = [f"{file}: no {missing}" for _, file in named if (missing := _missing(file))]
    if lacking:
        raise InfiniteVLError(
            f"{len(lacking)} of {len(named)} fonts in {folder!r} lack characters:",
            "take them out of the folder",
            lacking[:5] + ([f"and {len(lacking) - 5} more"] if len(lacking) > 5 else []),
        )
    return {
        family: tuple(str(file) for own, file in named if own == family)
        for family in {family for family, _ in named}
    }


def font(file: str, capital: float) -> ImageFont.FreeTypeFont:
    """A font in the size in which a capital is about `capital` pixels high."""
    return _open(file, max(1, round(capital / _capital(file))))


def fitting(file: str, text: str, capital: float, width: float) -> ImageFont.FreeTypeFont:
    """The font in which `text` is at most `width` pixels wide, and a capital at most `capital`
    high.

    Raises:
      InfiniteVLError: such a font cannot be read by anyone.
    """
    while capital >= SMALLEST:
        found = font(file, capital)
        if found.getlength(text) <= width:
            return found
        capital -= 1
    raise InfiniteVLError(
        f"{text!r} in {Path(file).name} does not fit into {width:g} pixels",
        "draw larger pictures (train.data.options.size), or take the font out of the folder",
    )


def _folder(name: str) -> Path:
    if not name:
        import matplotlib

        return Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    folder = Path(name)
    if not folder.is_dir():
        raise InfiniteVLError(
            f"the folder of fonts is {name!r}, which is no folder",
            'name a folder that holds fonts, or "" for those of matplotlib',
        )
    return folder


@functools.lru_cache(maxsize=8192)
def _open(file: str, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise InfiniteVLError(
            f"the font {file} cannot be read: {error}", "take it out of the folder of fonts"
        ) from None


@functools.cache
def _capital(file: str) -> float:
    """Height of a capital, as a share of the size."""
    _, top, _, bottom = _open(file, PROBE).getbbox("H")
    return (bottom - top) / PROBE


def _missing(file: Path) -> str:
    """Characters without a glyph of their own."""
    opened = _open(str(file), 24)
    none = _picture(opened, NO_CHARACTER)
    return "".join(c for c in CHARACTERS if _picture(opened, c) in (none, EMPTY))


def _picture(opened: ImageFont.FreeTypeFont, character: str) -> tuple[Sequence[int], bytes]:
    mask = opened.getmask(character)
    return mask.size, bytes(mask) if mask.size[0] and mask.size[1] else b""


EMPTY = ((0, 0), b"")
