"""Draw docs/architecture.svg, the picture of the README, with the sizes of the published model.

python docs/draw_architecture.py [--output docs/architecture.svg]
"""

import argparse
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, LINE, PAPER = "#1b1f24", "#57606a", "#ffffff"
VISION, TEXT, WINDOW, DELTA, CACHE = "#d6e9f8", "#e7e9ec", "#fde3c8", "#d9efdc", "#efe4f7"


class Canvas:
    """Boxes and arrows. Units are centimetres, the origin is at the lower left."""

    def __init__(self, width: float, height: float):
        self.figure = Figure(figsize=(width / 2.54, height / 2.54), facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        title: str,
        note: str = "",
        fill: str = TEXT,
    ):
        """Draw a box with a title and smaller lines below it."""
        style = "round,pad=0,rounding_size=0.15"
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=LINE, linewidth=0.8
            )
        )
        lines = note.count("\n") + 1 if note else 0
        middle = y + height / 2
        self.text(x + width / 2, middle + 0.23 * lines, title, 8.5, weight="bold")
        if note:
            self.text(x + width / 2, middle - 0.28, note, 7)

    def text(self, x: float, y: float, text: str, size: float, **style):
        self.axes.text(
            x,
            y,
            text,
            fontsize=size,
            ha=style.pop("ha", "center"),
            va="center",
            color=INK,
            linespacing=1.25,
            **style,
        )

    def arrow(self, start: tuple[float, float], end: tuple[float, float], both: bool = False):
        style = {
            "arrowstyle": "<|-|>" if both else "-|>",
            "color": LINE,
            "linewidth": 0.9,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 9,
        }
        self.axes.annotate("", end, start, arrowprops=style)


def draw() -> Figure:
    """The whole model, from pixels and text to the next token."""
    canvas = Canvas(31, 8.6)
    canvas.box(0.3, 5.6, 3.4, 1.6, "images, video", "patches of 14 x 14\npixels x 2 frames", VISION)
    canvas.box(
        4.5, 5.6, 3.9, 1.6, "vision tower", "28 blocks in windows,\n4 over the whole frame", VISION
    )
    canvas.box(9.2, 5.6, 3.0, 1.6, "merger", "2 x 2 patches\nto one token", VISION)
    canvas.box(0.3, 2.9, 3.4, 1.6, "text", "chat template,\ntokenizer", TEXT)
    canvas.box(9.2, 2.9, 3.0, 1.6, "embedding", "151,936 tokens\nof width 2,048", TEXT)
    canvas.arrow((3.7, 6.4), (4.5, 6.4))
    canvas.arrow((8.4, 6.4), (9.2, 6.4))
    canvas.arrow((3.7, 3.7), (9.2, 3.7))
    canvas.arrow((12.2, 6.4), (13.6, 4.7))
    canvas.arrow((12.2, 3.7), (13.6, 4.3))

    canvas.box(13.2, 0.9, 13.6, 7.4, "", fill=PAPER)
    canvas.text(20.0, 7.85, "decoder: 36 layers = 9 x these four", 8.5, weight="bold")
    xs = [13.6 + 3.3 * i for i in range(4)]
    for i, x in enumerate(xs):
        canvas.box(x, 6.3, 2.9, 0.9, "MLP", "", TEXT)
        if i == 0:
            canvas.box(
                x, 3.7, 2.9, 1.7, "sliding window", "attention over the\nlast 8,192 tokens", WINDOW
            )
        else:
            canvas.box(
                x, 3.7, 2.9, 1.7, "Gated DeltaNet", "16 heads, a state\nof 128 x 256 each", DELTA
            )
            canvas.arrow((xs[i - 1] + 2.9, 6.5), (x, 4.9))
        canvas.arrow((x + 1.45, 5.4), (x + 1.45, 6.3))
        canvas.arrow((x + 1.45, 3.7), (x + 1.45, 2.8), both=True)
    canvas.box(xs[0], 1.2, 2.9, 1.6, "keys, values", "ring buffer of 8,192", CACHE)
    canvas.box(
        xs[1],
        1.2,
        9.5,
        1.6,
        "recurrent states",
        "and the last 3 inputs of the short convolutions",
        CACHE,
    )
    canvas.arrow((26.4, 6.75), (27.5, 5.4))
    canvas.box(27.5, 3.7, 3.2, 1.7, "next token", "norm, head tied\nto the embedding", TEXT)
    canvas.text(20.0, 0.4, "cache: 133 MB per sequence at any length", 8.5)
    return canvas.figure


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("architecture.svg"))
    arguments = parser.parse_args()
    # keep text as text; the same drawing gives the same file
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "infinitevl",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    }
    with matplotlib.rc_context(settings):
        draw().savefig(arguments.output, format="svg", metadata={"Date": None})
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
