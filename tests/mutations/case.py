"""One mutated input.

What was changed, what the project does with it, and how the result is judged.
"""

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Case:
    """An input.

    Attributes:
      label: what was done to the original.
      action: what the project does with it.
      check: judges what the action returned: "" where it is right, else what is wrong with it.
      harmless: the mutation means nothing, so that even a refusal is wrong.
      writes: where the action may write, besides the place that is meant for it.
    """

    label: str
    action: Callable[[], Any]
    check: Callable[[Any], str]
    harmless: bool = False
    writes: tuple[Path, ...] = ()


SAID: list[str] = []  # warnings of the action that runs, or ran last


@dataclass
class Place:
    """Folders of a worker.

    `original(name, write)` holds what is mutated; `work` is empty before each case.
    """

    originals: Path
    work: Path

    @property
    def out(self) -> Path:
        """The only place that a case may write to."""
        return self.work / "out" / "result"

    def clear(self) -> None:
        """Empty `work`."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.out.parent.mkdir(parents=True)

    def original(self, name: str, write: Callable[[Path], Any]) -> Path:
        """The folder `name`, written by `write` when it is asked for first.

        Shared by all workers, never changed.
        """
        folder = self.originals / name
        if not folder.exists():
            aside = self.originals / f".{name}-{random.SystemRandom().randrange(1 << 60)}"
            write(aside)
            try:
                aside.rename(folder)
            except OSError:  # another worker was first
                shutil.rmtree(aside)
        return folder

    def copy(self, name: str, write: Callable[[Path], Any], to: str = "input") -> Path:
        """A fresh copy of an original that may be mutated."""
        return Path(shutil.copytree(self.original(name, write), self.work / to))


def refused_only(why: str) -> Callable[[Any], str]:
    """The check of an input that must not be accepted."""
    return lambda result: f"accepted: {why}"


def either(*checks: Callable[[Any], str]) -> Callable[[Any], str]:
    """Right where one of the checks says so; else what the last one says."""

    def check(result):
        for one in checks:
            if not (wrong := one(result)):
                return ""
        return wrong

    return check
