"""The training log RUN/log.jsonl, one JSON object per line, and its plot."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infinitevl_jax.reading import open_regular
from infinitevl_jax.writing import keep_aside, storage, write_text

logger = logging.getLogger(__name__)


class Log:
    """Appends lines to a log. Opening it drops lines after the restored checkpoint.

    A log with damaged lines is kept under another name.
    """

    def __init__(self, path: Path, step: int):
        """Open a log.

        Args:
          path: the log file.
          step: step of the restored checkpoint.
        """
        self.path = path
        lines, damaged = _read(path)
        if damaged:
            logger.warning(
                f"{damaged} damaged lines in {path}: it is kept as {keep_aside(path)}, the others"
                " go on"
            )
        self.lines = [line for line in lines if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        with storage(path):
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def write(self, **line: Any) -> None:
        """Write one line through to the file. Raises StorageError if that fails."""
        self.lines.append(line)
        with storage(self.path):
            text = (json.dumps(line) + "\n").encode()
            while text:  # a full disk takes only part of it
                text = text[os.write(self._file, text) :]

    def has(self, step: int, key: str) -> bool:
        """Whether a line of this step has this key."""
        return any(line["step"] == step and key in line for line in self.lines)

    def lowest(self, key: str, steps: Sequence[int]) -> int | None:
        """The step, among these, whose value of a key is lowest; the newest of equal ones."""
        found = [line for line in self.lines if key in line and line["step"] in steps]
        best = min(found, key=lambda line: (line[key], -line["step"]), default=None)
        return best and best["step"]

    def close(self) -> None:
        os.close(self._file)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log, without damaged ones (a kill may truncate the last)."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The valid lines, and the number of damaged ones apart from a truncated last line."""
    texts = []
    if path.exists():
        with storage(path), open_regular(path) as file:  # not a pipe or device, which may not end
            texts = file.read().split(b"\n")
    lines, damaged = [], 0
    for number, text in enumerate(texts):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not all(
                isinstance(value, int | float) for value in line.values()
            ):
                raise ValueError
            if type(line["step"]) is not int:
                raise ValueError
            lines.append(line)
        except (ValueError, KeyError, RecursionError):
            damaged += number < len(texts) - 1 and bool(text.strip())
    return lines, damaged


def plot_log(log: Path, picture: Path) -> None:
    """Plot training and held-out loss by step."""
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
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    aside = picture.with_name(f".{picture.stem}.partial{picture.suffix}")
    figure.savefig(aside, dpi=120)
    os.replace(aside, picture)
