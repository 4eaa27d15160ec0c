"""All tasks by name."""

import random
from collections.abc import Callable

from infinitevl_jax.data.drawing.charts import draw_chart
from infinitevl_jax.data.drawing.recall import draw_recall
from infinitevl_jax.data.drawing.receipts import draw_prices
from infinitevl_jax.data.drawing.scene import Scene, Supplies
from infinitevl_jax.data.drawing.shapes import draw_shapes
from infinitevl_jax.data.drawing.text import draw_lines, draw_word

TASKS: dict[str, Callable[[random.Random, Supplies], Scene]] = {
    "charts": draw_chart,
    "lines": draw_lines,
    "recall": draw_recall,
    "receipts": draw_prices,
    "shapes": draw_shapes,
    "words": draw_word,
}
