"""Coloured shapes to count and compare."""

import math
import random
from collections import Counter
from typing import NamedTuple

from PIL import ImageDraw

from infinitevl_jax.data.drawing.canvas import COLOURS, RGB, light, page, shade, side, worn
from infinitevl_jax.data.drawing.scene import Scene, Supplies

KINDS = ("circle", "rectangle", "triangle")
MOST = 9  # shapes of a picture
CELL = 30  # pixels of a shape's place, at least
ASKED = 3  # questions about a picture, at most


class Shape(NamedTuple):
    kind: str
    colour: str
    radius: float  # pixels


def draw_shapes(rng: random.Random, supplies: Supplies) -> Scene:
    """Up to nine shapes apart from each other."""
    width = side(rng, rng.uniform(64, supplies.size - 1), supplies.size)
    height = side(rng, rng.uniform(64, supplies.size - 1), supplies.size)
    columns, rows = max(1, width // CELL), max(1, height // CELL)
    count = rng.randint(1, min(MOST, columns * rows))
    cells = rng.sample([(c, r) for c in range(columns) for r in range(rows)], count)
    kinds = rng.sample(KINDS, rng.randint(1, 3))
    colours = rng.sample(sorted(COLOURS), rng.randint(1, 3))
    image, draw = page(width, height, light(rng))
    found = []
    for column, row in cells:
        cell_x, cell_y = width / columns, height / rows
        radius = rng.uniform(8, min(cell_x, cell_y) / 2 - 1)
        shape = Shape(rng.choice(kinds), rng.choice(colours), radius)
        x = cell_x * column + rng.uniform(radius, cell_x - radius)
        y = cell_y * row + rng.uniform(radius, cell_y - radius)
        draw_shape(draw, shape.kind, x, y, radius, shade(rng, shape.colour))
        found.append(shape)
    turns = _turns(rng, found, kinds, colours)
    return Scene([worn(rng, image)], rng.sample(turns, min(ASKED, len(turns))))


def draw_shape(
    draw: ImageDraw.ImageDraw, kind: str, x: float, y: float, radius: float, colour: RGB
) -> None:
    """A filled shape around (x, y)."""
    if kind == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)
    elif kind == "rectangle":
        draw.rectangle((x - radius, y - 0.8 * radius, x + radius, y + 0.8 * radius), colour)
    else:
        corners = [math.pi * (2 * i / 3 - 0.5) for i in range(3)]
        draw.polygon(
            [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in corners], colour
        )


def _turns(
    rng: random.Random, shapes: list[Shape], kinds: list[str], colours: list[str]
) -> list[tuple[str, str]]:
    """Questions of each form that has one answer."""
    by_kind, by_colour = Counter(s.kind for s in shapes), Counter(s.colour for s in shapes)
    turns = [("how many shapes are there?", str(len(shapes)))]
    kind = rng.choice(kinds if rng.random() < 0.7 else KINDS)
    colour = rng.choice(colours)
    both = sum(s.kind == kind and s.colour == colour for s in shapes)
    turns += [
        (f"how many {kind}s are there?", str(by_kind[kind])),
        (f"how many {colour} shapes are there?", str(by_colour[colour])),
        (f"how many {colour} {kind}s are there?", str(both)),
    ]
    one, other = rng.sample(KINDS, 2)
    if by_kind[one] != by_kind[other]:
        more = "yes" if by_kind[one] > by_kind[other] else "no"
        turns.append((f"are there more {one}s than {other}s?", more))
    if len(colours) > 1:
        one, other = rng.sample(colours, 2)
        if by_colour[one] != by_colour[other]:
            more = "yes" if by_colour[one] > by_colour[other] else "no"
            turns.append((f"are there more {one} shapes than {other} shapes?", more))
    ordered = sorted(shapes, key=lambda s: s.radius)
    if len(ordered) > 1 and ordered[-1].radius > 1.25 * ordered[-2].radius:
        turns.append(("what color is the largest shape?", ordered[-1].colour))
        turns.append(("what shape is the largest?", ordered[-1].kind))
    return turns
