"""Plot of sample answers."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from infinitevl_jax.data.conversation import Turns
from infinitevl_jax.errors import quoted
from infinitevl_jax.processing import load_image


def draw_samples(
    samples: Sequence[tuple[Turns, int, str]], picture: Path, columns: int = 5
) -> None:
    """Plot images with a question and the model's answer; wrong answers in red with the label.

    Args:
      samples: (row, index of the question, the model's answer).
      picture: file to write.
      columns: images per line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = -(-len(samples) // columns)
    figure = Figure(figsize=(2.4 * columns, 2.7 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = np.atleast_1d(figure.subplots(lines, columns)).reshape(-1)
    for axes in grid:
        axes.axis("off")
    for axes, (row, number, answer) in zip(grid, samples, strict=False):
        truth = row.answers[number]
        axes.imshow(np.asarray(load_image(row.image)))
        right = answer == truth
        said = quoted(answer) + ("" if right else f" (is {truth})")
        colour = "black" if right else "firebrick"
        text = f"{row.questions[number]}\n{said}"
        axes.set_title(text, fontsize=8, color=colour, wrap=True, parse_math=False)
    aside = picture.with_name(f".partial-{picture.name}")
    with warnings.catch_warnings(action="ignore"):  # of characters that the font lacks
        figure.savefig(aside, dpi=110)
    os.replace(aside, picture)
