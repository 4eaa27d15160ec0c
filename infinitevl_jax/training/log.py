"""RUN/log.jsonl, one line a logged step, and the picture of it."""

import json
import os
from pathlib import Path
from typing import Any


class Log:
    """Appends lines; a run that goes on first drops what was logged after its checkpoint."""

    def __init__(self, path: Path, step: int):
        self.path = path
        kept = [line for line in read_log(path) if line["step"] <= step]
        aside = path.with_name(f".{path.name}.partial")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        os.replace(aside, path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, **line: Any) -> None:
        """One line, on disk when this returns."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a kill cut short is left out."""
    lines = []
    for text in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def plot_log(log: Path, picture: Path) -> None:
    """Loss by step, on training and held-out data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_log(log)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("held_out_loss", "held out", "o--")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=4)
    axes.set(xlabel="step", ylabel="cross entropy of answer tokens (nats)", yscale="log")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    aside = picture.with_name(f".partial-{picture.name}")
    figure.savefig(aside, dpi=120)
    os.replace(aside, picture)
