"""Code in Markdown files: fenced blocks, shell lines, commands inside sentences and tables,
links."""

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
# What a comment says of a command that a test must not run.
LONG = re.compile(r"\bon (a GPU|two GPUs|four GPUs)\b|\btakes minutes\b")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One shell command. `runs`: it is short, and a test runs it."""

    words: tuple[str, ...]
    runs: bool


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found, start, language, text = [], None, "", []
    for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
        if not line.startswith("```"):
            text.append(line)
        elif start is None:
            start, language, text = number, line.removeprefix("```").strip(), []
        else:
            found.append(Block(page, start, language, "\n".join(text) + "\n"))
            start = None
    assert start is None, f"{page.name}:{start} is never closed"
    return found


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block, a line each."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            comment = line.partition(" #")[2]
            yield Command(tuple(words), not LONG.search(comment))


def examples(program: Path) -> list[Command]:
    """The commands of this project in a program's docstring, which --help shows. Not run."""
    text = ast.get_docstring(ast.parse(program.read_text("utf-8")))
    indented = [line for line in text.splitlines() if line.startswith("    ")]
    block = Block(program, 1, "bash", textwrap.dedent("\n".join(indented)))
    return [Command(c.words, False) for c in commands(block) if c.words[0] == "python"]


def mentioned(page: Path) -> list[Command]:
    """Commands of this project in sentences and tables, which are not run."""
    outside = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]
    return [
        Command(tuple(shlex.split(span)), False)
        for span in spans
        if re.match(r"python -?[\w/. ]", span) and "..." not in span
    ]


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    """What a link may name after #, as code hosts make it of a heading."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
