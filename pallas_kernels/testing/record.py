"""The parity matrix's results as lines of JSON, written as they come, so that several calls of the
command make one record."""

import json
from collections.abc import Mapping
from pathlib import Path


class Record:
    """Cells by name, from a file to which later cells are appended. The last line of a cell counts.
    Without a path nothing is written."""

    def __init__(self, path: Path | None = None):
        self.path = path
        self.cells: dict[str, dict] = {}
        if path is not None and path.exists():
            for line in path.read_text("utf-8").splitlines():
                cell = json.loads(line)
                self.cells[cell["cell"]] = cell

    def passed(self, name: str) -> bool:
        """Whether that cell is in the record and passed. A refused cell passes."""
        return name in self.cells and self.cells[name]["passed"]

    def add(self, name: str, passed: bool, line: str, facts: Mapping) -> None:
        """line: what is printed of the cell. facts: everything else, ready for JSON."""
        cell = {"cell": name, "passed": passed, "line": line, **facts}
        self.cells[name] = cell
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell) + "\n")

    def bad(self) -> list[str]:
        """The lines of those that failed."""
        return [cell["line"] for cell in self.cells.values() if not cell["passed"]]

    def ran(self) -> int:
        """How many were computed."""
        return sum(not cell["refusal"] for cell in self.cells.values())
