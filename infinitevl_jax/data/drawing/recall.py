"""A row of pictures, and a question about one that came some pictures ago."""

import math
import random

from PIL import Image

from infinitevl_jax.data.drawing.canvas import COLOURS, light, luminance, page, shade
from infinitevl_jax.data.drawing.fonts import fitting
from infinitevl_jax.data.drawing.scene import Scene, Supplies
from infinitevl_jax.data.drawing.shapes import KINDS, draw_shape

SIDES = (32, 48)  # pixels of a picture
CARDS = 3  # at most
NEAR = 4  # pictures ago that are asked by their number
CHANCE = 0.25  # of such a question


def draw_recall(rng: random.Random, supplies: Supplies) -> Scene:
    """Pictures of shapes, and among them a few cards: a number on a coloured ground.

    Asked is the number on the card of a colour, or which shape was shown one to four pictures ago.
    """
    side, file = rng.choice(SIDES), supplies.fonts.choose(rng)
    if not supplies.ago and rng.random() < CHANCE:
        return _near(rng, side, supplies.frames)
    ago = supplies.ago or _spread(rng, supplies.frames)  # of the card asked for
    later = rng.randint(0, min(CARDS - 1, ago - 1))  # other cards behind it
    colours = rng.sample(sorted(COLOURS), 1 + later)
    places = [-ago, *(-1 - i for i in rng.sample(range(ago - 1), later))] if later else [-ago]
    pictures = [_shape(rng, side)[0] for _ in range(ago)]
    asked = ""
    for place, colour in zip(places, colours, strict=True):
        number = str(rng.randint(10, 99))
        pictures[place] = _card(rng, side, file, colour, number)
        asked = asked or number
    before = supplies.frames - ago if not supplies.ago else 0
    pictures = [_shape(rng, side)[0] for _ in range(rng.randint(0, min(4, before)))] + pictures
    return Scene(pictures, [(f"what number was on the {colours[0]} card?", asked)])


def _near(rng: random.Random, side: int, frames: int) -> Scene:
    count = rng.randint(1, max(1, min(frames, 2 * NEAR)))
    shown = [_shape(rng, side) for _ in range(count)]
    ago = rng.randint(1, min(NEAR, count))
    question = (
        "what shape was shown last?" if ago == 1 else f"what shape was shown {ago} pictures ago?"
    )
    return Scene([image for image, _ in shown], [(question, shown[-ago][1])])


def _spread(rng: random.Random, most: int) -> int:
    """A number from 1 to `most`, on a logarithmic scale."""
    return min(most, int(math.exp(rng.uniform(0, math.log(most + 1)))))


def _shape(rng: random.Random, side: int) -> tuple[Image.Image, str]:
    image, draw = page(side, side, light(rng))
    kind, radius = rng.choice(KINDS), rng.uniform(0.25, 0.4) * side
    x, y = (rng.uniform(radius, side - radius) for _ in range(2))
    draw_shape(draw, kind, x, y, radius, shade(rng, rng.choice(sorted(COLOURS))))
    return image, kind


def _card(rng: random.Random, side: int, file: str, colour: str, number: str) -> Image.Image:
    ground = shade(rng, colour)
    image, draw = page(side, side, ground)
    ink = (255, 255, 255) if luminance(ground) < 128 else (0, 0, 0)
    font = fitting(file, number, 0.45 * side, 0.85 * side)
    draw.text((side / 2, side / 2), number, ink, font, anchor="mm")
    return image
