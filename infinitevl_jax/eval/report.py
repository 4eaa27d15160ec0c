"""Results of an evaluation as a table, a file, and a picture of answers."""

import json
from collections.abc import Mapping
from pathlib import Path

from infinitevl_jax.data.conversation import Turns
from infinitevl_jax.eval.picture import draw_samples
from infinitevl_jax.eval.tasks import Result, Task
from infinitevl_jax.writing import write_text

WRONG, RIGHT = 2, 3  # answers of a task in the picture, if there are so many


def table(results: Mapping[str, Result]) -> list[str]:
    """Lines of figures, a task each."""
    head = ("task", "questions", "right", "not yes/no", "blind", "tokens of a prompt")
    lines = [head]
    for name, found in results.items():
        shares = (found.score.all, found.score.other, found.blind.all)
        figures = [f"{share:.1%}" for share in shares]
        if not found.score.questions_other:
            figures[1] = ""
        questions = f"{found.score.questions:,}"
        lines.append((name or "all", questions, *figures, f"{found.tokens:,.0f}"))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def write_results(folder: Path, tasks: Mapping[str, Task], results: Mapping[str, Result]) -> None:
    """Write results.json and samples.png to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: found.as_json() for name, found in results.items()}
    write_text(folder / "results.json", json.dumps(figures, indent=2) + "\n")
    samples = [
        sample for name, found in results.items() for sample in choose(tasks[name].rows, found)
    ]
    if samples:
        draw_samples(samples, folder / "samples.png", WRONG + RIGHT)


def choose(rows: list[Turns], result: Result) -> list[tuple[Turns, int, str]]:
    """The first wrong answers of a task, then right ones, of different rows."""
    seen: dict[bool, list[tuple[Turns, int, str]]] = {True: [], False: []}
    for number, (row, answers) in enumerate(zip(rows, result.answers, strict=True)):
        if not row.pictures:
            continue
        i = number % len(answers)
        seen[answers[i] == row.answers[i]].append((row, i, answers[i]))
    wrong = seen[False][: max(WRONG, WRONG + RIGHT - len(seen[True]))]
    return [*wrong, *seen[True][: WRONG + RIGHT - len(wrong)]]
