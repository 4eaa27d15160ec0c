"""One line of JSON a result: what was measured, when, on what, with which versions, at which commit."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def add_commit(parser: argparse.ArgumentParser) -> None:
    """Add --commit; it may be left out only where git knows the answer, so that no long run ends without one."""
    here = _git("describe", "--always", "--dirty", "--abbrev=12")
    text = f"the commit measured (default {here})" if here else "the commit measured: these sources have no git history to name it"
    parser.add_argument("--commit", default=here, required=not here, help=text)


def record(name: str, commit: str, figures: dict, path: Path | None = None) -> dict:
    """Print the line, append it to a file (by default benchmarks/results/NAME.jsonl), and return it."""
    content = {**circumstances(), "commit": commit, **figures}
    line = json.dumps(content)
    print(line, flush=True)
    path = path or RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    return content


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages, such as those a peer is made of; the names are pip's."""
    return {package: importlib.metadata.version(package) for package in packages}


def circumstances() -> dict[str, str]:
    """Date, device and versions."""
    import jax

    kind = jax.devices()[0].device_kind
    device = f"{_processor()}, {os.cpu_count()} cores" if kind == "cpu" else kind
    return {"date": datetime.date.today().isoformat(), "device": device, "python": platform.python_version(), **versions("jax")}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
