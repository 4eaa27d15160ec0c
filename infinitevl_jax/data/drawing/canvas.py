"""Pages to draw on, named colours, and what a camera adds."""

import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

RGB = tuple[int, int, int]
COLOURS: dict[str, RGB] = {  # the names of easy-VQA
    "black": (0, 0, 0),
    "blue": (25, 45, 235),
    "brown": (140, 75, 30),
    "gray": (125, 125, 125),
    "green": (20, 160, 30),
    "red": (230, 25, 25),
    "teal": (0, 150, 150),
    "yellow": (245, 215, 20),
}
CONTRAST = 100  # least difference in luminance of ink and paper
STEP = 16  # sides of most pictures are multiples of this


def luminance(colour: RGB) -> float:
    """0 for black, 255 for white."""
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def shade(rng: random.Random, name: str) -> RGB:
    """A named colour, a little different each time."""
    return _rgb(*(min(255, max(0, c + rng.randint(-18, 18))) for c in COLOURS[name]))


def light(rng: random.Random, darkest: int = 225) -> RGB:
    """A colour near white."""
    return _rgb(*(rng.randint(darkest, 255) for _ in range(3)))


def ink_and_paper(rng: random.Random) -> tuple[RGB, RGB]:
    """Two colours that can be told apart. Mostly dark ink on light paper."""
    while True:
        paper = light(rng, 200) if rng.random() < 0.6 else _any(rng)
        ink = _rgb(*(rng.randint(0, 70) for _ in range(3))) if rng.random() < 0.6 else _any(rng)
        if abs(luminance(ink) - luminance(paper)) >= CONTRAST:
            return ink, paper


def side(rng: random.Random, needed: float, most: int) -> int:
    """A side of at least `needed` and at most `most` pixels, mostly a multiple of 16."""
    exact = min(most, int(needed) + 1)
    return exact if rng.random() < 0.2 else min(most, -(-exact // STEP) * STEP)


def page(width: int, height: int, paper: RGB) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture, and what draws on it."""
    image = Image.new("RGB", (width, height), paper)
    return image, ImageDraw.Draw(image)


def worn(rng: random.Random, image: Image.Image) -> Image.Image:
    """The picture as it is, or with noise or blur."""
    kind = rng.random()
    if kind < 0.2:
        strength = rng.randint(4, 20)
        noise = np.random.default_rng(rng.getrandbits(32)).integers(
            -strength, strength, (image.height, image.width, 1), np.int16, endpoint=True
        )
        return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    if kind < 0.3:
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.7)))
    return image


def _any(rng: random.Random) -> RGB:
    return _rgb(*(rng.randint(0, 255) for _ in range(3)))


def _rgb(red: int, green: int, blue: int) -> RGB:
    return red, green, blue
