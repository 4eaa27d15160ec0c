"""Small bar charts."""

import random

from PIL import ImageDraw, ImageFont

from infinitevl_jax.data.drawing.canvas import COLOURS, RGB, light, luminance, page, shade, worn
from infinitevl_jax.data.drawing.fonts import fitting
from infinitevl_jax.data.drawing.scene import Scene, Supplies

BARS = 6  # at most
HIGHEST = 99  # largest value
CAPITAL = 7  # pixels of a capital letter
ASKED = 3  # questions about a chart, at most
Bar = tuple[str, int]  # label and value


def draw_chart(rng: random.Random, supplies: Supplies) -> Scene:
    """Bars with labels, standing or lying, with their values beside them or without."""
    count, standing = rng.randint(2, BARS), rng.random() < 0.5
    labels = supplies.words.words(rng, count, longest=4 if standing else 7)
    bars = list(zip(labels, rng.sample(range(1, HIGHEST + 1), count), strict=True))
    valued = rng.random() < 0.6
    dark = rng.random() < 0.1
    paper = (25, 25, 30) if dark else light(rng, 235)
    ink = (240, 240, 240) if dark else (rng.randint(0, 60),) * 3
    seen = [n for n, c in COLOURS.items() if abs(luminance(c) - luminance(paper)) > 35]
    fills = [shade(rng, rng.choice(seen)) for _ in bars]
    if rng.random() < 0.6:
        fills = fills[:1] * count
    file = supplies.fonts.choose(rng)
    slot = min(30, (supplies.size - 12) // count)  # pixels of a bar with the space beside it
    long = rng.randint(6 * supplies.size // 10, supplies.size)  # along the bars
    across = slot * count + 12
    width, height = (across, long) if standing else (long, across)
    image, draw = page(width, height, paper)
    room = slot if standing else 0.35 * width
    fitted = min((fitting(file, label, CAPITAL, room) for label in labels), key=lambda f: f.size)
    paint = _stand if standing else _lie
    paint(draw, bars, fills, ink, fitted, slot, long, valued)
    turns = _turns(rng, bars, valued)
    return Scene([worn(rng, image)], rng.sample(turns, min(ASKED, len(turns))))


def _stand(
    draw: ImageDraw.ImageDraw,
    bars: list[Bar],
    fills: list[RGB],
    ink: RGB,
    font: ImageFont.FreeTypeFont,
    slot: int,
    long: int,
    valued: bool,
) -> None:
    tall = 2.4 * CAPITAL  # of a line of text
    base, room = long - tall - 2, long - 2 * tall - 6
    for number, ((label, value), fill) in enumerate(zip(bars, fills, strict=True)):
        middle = 6 + slot * (number + 0.5)
        top = base - max(1, room * value / HIGHEST)
        draw.rectangle((middle - 0.35 * slot, top, middle + 0.35 * slot, base), fill)
        draw.text((middle, base + 2), label, ink, font, anchor="mt")
        if valued:
            draw.text((middle, top - 2), str(value), ink, font, anchor="mb")
    draw.line((4, base, 8 + slot * len(bars), base), ink)


def _lie(
    draw: ImageDraw.ImageDraw,
    bars: list[Bar],
    fills: list[RGB],
    ink: RGB,
    font: ImageFont.FreeTypeFont,
    slot: int,
    long: int,
    valued: bool,
) -> None:
    left = 6 + max(font.getlength(label) for label, _ in bars)
    room = long - left - font.getlength("99") - 8
    for number, ((label, value), fill) in enumerate(zip(bars, fills, strict=True)):
        middle = 6 + slot * (number + 0.5)
        end = left + max(1, room * value / HIGHEST)
        draw.rectangle((left, middle - 0.35 * slot, end, middle + 0.35 * slot), fill)
        draw.text((left - 3, middle), label, ink, font, anchor="rm")
        if valued:
            draw.text((end + 3, middle), str(value), ink, font, anchor="lm")
    draw.line((left, 4, left, 8 + slot * len(bars)), ink)


def _turns(rng: random.Random, bars: list[Bar], valued: bool) -> list[tuple[str, str]]:
    """Questions about a chart. Values are asked only where they are written."""
    ordered = sorted(bars, key=lambda bar: bar[1])
    one, other = rng.sample(bars, 2)
    turns = [
        ("how many bars are there?", str(len(bars))),
        (f"is {one[0]} more than {other[0]}?", "yes" if one[1] > other[1] else "no"),
    ]
    if valued or ordered[-1][1] - ordered[-2][1] >= 5:
        turns.append(("which bar is the highest?", ordered[-1][0]))
    if valued or ordered[1][1] - ordered[0][1] >= 5:
        turns.append(("which bar is the lowest?", ordered[0][0]))
    if valued:
        asked = rng.sample(bars, 2)
        turns += [(f"what is the value of {label}?", str(value)) for label, value in asked]
    return turns
