"""Curves and tables of linearisations, from their logs and figures.

Examples:

    python -m benchmarks.training.curves runs/linearise runs/paper runs/window --picture curves.png
    python -m benchmarks.training.curves runs/linearise --tables linearise.md

The curves are against the tokens of all stages: relative error of stage I-1, held-out perplexity
during stage I-2 and divergence in it, and perplexity over the teacher's after each stage.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.training.figures import FigureLog
from benchmarks.training.linearise import STAGES, START
from infinitevl_jax.train.folder import PRESET
from infinitevl_jax.train.log import read_log

Line = dict[str, Any]


class Job(NamedTuple):
    """A folder of `benchmarks.training.linearise`.

    Attributes:
      log: lines of each stage, with `tokens` since the start of the first.
      ends: tokens at the end of each stage. figures: its figures.
    """

    name: str
    log: dict[str, list[Line]]
    ends: dict[str, int]
    figures: list[Line]


def read_job(out: Path) -> Job:
    """Read what is there. Raises SystemExit if that is nothing."""
    figures = FigureLog(out / "figures.jsonl").lines()
    log: dict[str, list[Line]] = {}
    tokens, ends = 0, {START: 0}
    for stage in STAGES:
        if not (out / stage / PRESET).exists():
            continue
        data = json.loads((out / stage / PRESET).read_text("utf-8"))["train"]["data"]
        lines = read_log(out / stage / "log.jsonl")
        each = data["batch"] * data["length"]
        log[stage] = [{**line, "tokens": tokens + line["step"] * each} for line in lines]
        tokens += each * max((line["step"] for line in lines), default=0)
        ends[stage] = tokens
    if not figures and not log:
        raise SystemExit(f"{out} holds no runs and no figures\n  -> benchmarks.training.linearise")
    return Job(out.name, log, ends, figures)


def geometric(values: Iterable[float]) -> float | None:
    """Geometric mean; None of nothing."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def ratio(lines: Iterable[Line], stage: str, unseen: bool) -> float | None:
    """Perplexity over the teacher's after a stage: geometric mean over corpora."""
    return geometric(
        line["ratio"]
        for line in lines
        if (line["part"], line["stage"]) == ("text", stage) and line["unseen"] == unseen
    )


def draw(jobs: Sequence[Job], picture: Path) -> None:
    """The curves, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2).flatten()
    panels: list[tuple[str, str, str, Callable[[float], float]]] = [
        ("layerwise", "relative_error", "relative error of mixers (I-1)", float),
        ("distill", "kl", "KL(teacher || student) (I-2)", float),
        ("distill", "held_out_cross_entropy", "held-out perplexity (I-2)", math.exp),
    ]
    for job in jobs:
        for axis, (stage, key, title, value) in zip(axes, panels, strict=False):
            lines = [line for line in job.log.get(stage, []) if key in line]
            axis.plot(
                [line["tokens"] for line in lines],
                [value(line[key]) for line in lines],
                *(["o-"] if key.startswith("held_out") else []),
                label=job.name,
                linewidth=1,
                markersize=4,
            )
            axis.set(title=title)
        for unseen, style in ((False, "o-"), (True, "x--")):
            found = [
                (tokens, value)
                for stage, tokens in job.ends.items()
                if (value := ratio(job.figures, stage, unseen)) is not None
            ]
            if found:
                label = f"{job.name}, unseen" if unseen else job.name
                axes[3].plot(*zip(*found, strict=True), style, label=label, linewidth=1)
    axes[3].set(title="perplexity / teacher's, after stages")
    for axis in axes:
        axis.set(xlabel="tokens", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize="small")
    aside = picture.with_name(f".{picture.name}.partial")
    figure.savefig(aside, dpi=120, format="png")
    os.replace(aside, picture)


def tables(jobs: Sequence[Job]) -> str:
    """Markdown tables of the figures."""
    parts = []
    for title, part, head, row in (
        (
            "Perplexity / teacher's at the training length",
            "text",
            ("corpus", "perplexity", "teacher", "ratio", "KL", "agreement"),
            ("corpus", "perplexity", "teacher_perplexity", "ratio", "kl", "agreement"),
        ),
        (
            "Perplexity of the end of longer rows",
            "long",
            ("corpus", "x length", "whole history", "near history", "ratio", "teacher, whole"),
            (
                *("corpus", "multiple", "perplexity", "perplexity_near", "ratio"),
                "teacher_perplexity",
            ),
        ),
        (
            "Greedy agreement with the teacher",
            "greedy",
            ("prompts", "tokens", "agreement", "first tokens, free", "before the first other"),
            ("corpus", "tokens", "agreement", "free_agreement", "free_tokens"),
        ),
        (
            "Recall of a number",
            "recall",
            ("tokens back", "windows", "student", "teacher"),
            ("distance", "windows", "exact", "teacher_exact"),
        ),
    ):
        lines = [
            (job.name, line["stage"], *(line[key] for key in row))
            for job in jobs
            for line in job.figures
            if line["part"] == part
        ]
        if lines:
            parts += [f"## {title}", "", *_table(("run", "stage", *head), lines), ""]
    answers = [
        (job, line) for job in jobs for line in job.figures if line.get("answers") is not None
    ]
    for job, line in answers:
        parts += [f"## Answers: {job.name}, {line['stage']}", ""]
        rows = [(a["question"], a["teacher"], a["student"]) for a in line["answers"]]
        parts += [*_table(("question", "teacher", "student"), rows), ""]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", "<br>")

    lines = [head, *([cell(value) for value in row] for row in rows)]
    shown = [f"| {' | '.join(line)} |" for line in lines]
    return [shown[0], "|" + "---|" * len(head), *shown[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "out", type=Path, nargs="+", help="folders of benchmarks.training.linearise"
    )
    parser.add_argument("--picture", type=Path, help="file of the curves, .png")
    parser.add_argument("--tables", type=Path, help="file of the tables; default: the terminal")
    options = parser.parse_args()
    jobs = [read_job(out) for out in options.out]
    if options.picture:
        draw(jobs, options.picture)
    if options.tables:
        options.tables.write_text(tables(jobs), "utf-8")
    else:
        print(tables(jobs))


if __name__ == "__main__":
    main()
