"""Receipts and price tags."""

import random

from PIL import Image

from infinitevl_jax.data.drawing.canvas import ink_and_paper, light, page, side, worn
from infinitevl_jax.data.drawing.fonts import fitting
from infinitevl_jax.data.drawing.scene import Scene, Supplies
from infinitevl_jax.data.drawing.words import money, price

ITEMS = 5  # of a receipt at most
ASKED = 3  # questions about a receipt, at most
MARGIN = 6  # pixels


def draw_prices(rng: random.Random, supplies: Supplies) -> Scene:
    """A receipt with a printed total, or a price tag."""
    return _receipt(rng, supplies) if rng.random() < 0.7 else _tag(rng, supplies)


def _receipt(rng: random.Random, supplies: Supplies) -> Scene:
    shop, *items = supplies.words.words(rng, 1 + rng.randint(1, ITEMS), longest=8)
    prices = [price(rng) for _ in items]
    total = money(sum(prices))
    sign = rng.choice(("", "", "$"))
    title = shop.upper() if rng.random() < 0.5 else shop.capitalize()
    word = rng.choice(("total", "Total", "TOTAL", "sum"))
    lines = [
        *((item, sign + money(cents)) for item, cents in zip(items, prices, strict=True)),
        (word, sign + total),
    ]
    capital, file = rng.uniform(6.5, 9), supplies.fonts.choose(rng)
    width = rng.randint(7 * supplies.size // 12, supplies.size)
    room = width - 2 * MARGIN
    font = min(
        (fitting(file, f"{a}  {b}", capital, room) for a, b in [(title, ""), *lines]),
        key=lambda f: f.size,
    )
    gap = (supplies.size - 2 * MARGIN) / (len(lines) + 1.5)
    gap = min(gap, 2.3 * capital * rng.uniform(0.95, 1.15))
    paper, ink = light(rng, 230), (rng.randint(0, 70),) * 3
    height = min(supplies.size, round(gap * (len(lines) + 1.5) + 2 * MARGIN))
    image, draw = page(width, height, paper)
    draw.text((width / 2, MARGIN), title, ink, font, anchor="mt")
    for number, (left, right) in enumerate(lines, 1):
        y = MARGIN + gap * (number + 0.5 * (number == len(lines)))
        draw.text((MARGIN, y), left, ink, font, anchor="lt")
        draw.text((width - MARGIN, y), right, ink, font, anchor="rt")
        if number == len(lines):
            draw.line((MARGIN, y - 0.25 * gap, width - MARGIN, y - 0.25 * gap), ink)
    turns = [
        ("what is the total?", total),
        ("how many items are there?", str(len(items))),
        ("which shop is this?", title),
    ]
    number = rng.randrange(len(items))
    turns.append((f"what does {items[number]} cost?", money(prices[number])))
    if len(prices) > 1 and prices.count(max(prices)) == 1:
        turns.append(("which item costs most?", items[prices.index(max(prices))]))
    return Scene([worn(rng, image)], rng.sample(turns, min(ASKED, len(turns))))


def _tag(rng: random.Random, supplies: Supplies) -> Scene:
    item, cents = supplies.words.word(rng, 9), price(rng)
    ink, paper = ink_and_paper(rng)
    file, sign = supplies.fonts.choose(rng), rng.choice(("", "$"))
    room, capital = supplies.size - 2 * MARGIN, rng.uniform(12, 22)
    large = fitting(file, sign + money(cents), capital, room)
    small = fitting(file, item, max(7, capital / 2), room)
    width = max(large.getlength(sign + money(cents)), small.getlength(item)) + 2 * MARGIN
    height = 2 * MARGIN + large.size + 1.3 * small.size
    image, draw = page(side(rng, width, supplies.size), side(rng, height, supplies.size), paper)
    draw.text((image.width / 2, MARGIN), item, ink, small, anchor="mt")
    draw.text(
        (image.width / 2, image.height - MARGIN), sign + money(cents), ink, large, anchor="mb"
    )
    turns = [
        (f"what does {item} cost?" if rng.random() < 0.5 else "what is the price?", money(cents)),
        ("which item is this?", item),
    ]
    return Scene([_bordered(rng, worn(rng, image), ink)], turns)


def _bordered(rng: random.Random, image: Image.Image, ink: tuple[int, int, int]) -> Image.Image:
    """With a frame around it, sometimes."""
    if rng.random() < 0.4:
        inner = image.crop((1, 1, image.width - 1, image.height - 1))
        image = Image.new("RGB", image.size, ink)
        image.paste(inner, (1, 1))
    return image
