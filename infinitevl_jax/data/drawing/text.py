"""Words and lines of text to read."""

import random

from PIL import Image

from infinitevl_jax.data.drawing.canvas import ink_and_paper, page, side, worn
from infinitevl_jax.data.drawing.fonts import fitting
from infinitevl_jax.data.drawing.scene import Scene, Supplies
from infinitevl_jax.data.drawing.words import cased, money, price

MARGIN = 6  # pixels on each side of a text, at least
LINE = 22  # characters of a line at most
WORD = ("what does it say?", "what is written here?", "which word is this?", "read the word.")
NUMBER = ("what does it say?", "what is written here?", "which number is this?")
TEXT = ("what does it say?", "what is written here?", "read the line.")
ORDER = ("first", "second", "third")


def draw_word(rng: random.Random, supplies: Supplies) -> Scene:
    """One word or number."""
    number = rng.random() < 0.15
    text = _number(rng) if number else cased(rng, supplies.words.word(rng))
    image = _written(rng, supplies, [text], rng.uniform(8, 28))
    return Scene([image], [(rng.choice(NUMBER if number else WORD), text)])


def draw_lines(rng: random.Random, supplies: Supplies) -> Scene:
    """One to three lines of a few words."""
    texts = [_line(rng, supplies) for _ in range(rng.choice((1, 1, 2, 3)))]
    image = _written(rng, supplies, texts, rng.uniform(7, 14))
    if len(texts) == 1:
        return Scene([image], [(rng.choice(TEXT), texts[0])])
    asked = rng.sample(range(len(texts)), 2)
    turns = [(f"what does the {ORDER[i]} line say?", texts[i]) for i in asked]
    if rng.random() < 0.2:
        turns.append(("how many lines are there?", str(len(texts))))
    return Scene([image], turns)


def _line(rng: random.Random, supplies: Supplies) -> str:
    parts = [_number(rng) if rng.random() < 0.15 else supplies.words.word(rng, 10)]
    for _ in range(rng.randint(1, 3)):
        part = _number(rng) if rng.random() < 0.15 else supplies.words.word(rng, 8)
        if len(" ".join([*parts, part])) > LINE:
            break
        parts.append(part)
    text = " ".join(parts)
    kind = rng.random()
    text = text if kind < 0.5 else text[0].upper() + text[1:] if kind < 0.85 else text.upper()
    return text + rng.choice(("", "", "", ".", "!", "?")) if len(text) < LINE else text


def _number(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return str(rng.randrange(10 ** rng.randint(1, 5)))
    if kind < 0.75:
        return money(price(rng))
    return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"


def _written(
    rng: random.Random, supplies: Supplies, texts: list[str], capital: float
) -> Image.Image:
    """A picture of lines of text, somewhere on a page that holds them."""
    file, room = supplies.fonts.choose(rng), supplies.size - 2 * MARGIN
    fitted = min((fitting(file, text, capital, room) for text in texts), key=lambda f: f.size)
    boxes = [fitted.getbbox(text) for text in texts]
    left, top = min(b[0] for b in boxes), min(b[1] for b in boxes)
    width, height = max(b[2] for b in boxes) - left, max(b[3] for b in boxes) - top
    more = len(texts) - 1
    gap = min(height * rng.uniform(1.1, 1.5), (room - height) / max(more, 1))  # line to line
    tall = height + gap * more
    spare = 2 * MARGIN + rng.choice((0, 0, rng.uniform(0, 30)))
    ink, paper = ink_and_paper(rng)
    image, draw = page(
        side(rng, width + spare, supplies.size), side(rng, tall + spare, supplies.size), paper
    )
    x = rng.uniform(2, max(2, image.width - width - 2)) - left
    y = rng.uniform(2, max(2, image.height - tall - 2)) - top
    for number, text in enumerate(texts):
        draw.text((x, y + number * gap), text, ink, fitted)
    return worn(rng, image)
