"""Results as JSON lines: measurements with date, device, versions and commit.

A results file is a snapshot: it holds the newest line of each case and device. Older lines are in
the history of the repository.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

# The keys that, with the device, identify a case of a benchmark. A line that lacks a key has its
# default.
CASES = {
    "attend": ("case", "heads", "width", "window", "dtype", "implementation", "work", "length"),
    "convert": ("parameters",),
    "data": ("part", "side", "workers", "lookahead", "length"),
    "decode": ("op", "dtype", "sizes", "implementation", "batch"),
    "easy_vqa": ("parameters", "steps", "seed"),
    "full_size": ("parameters", "prompt"),
    "gated_delta_rule": ("heads", "widths", "dtype", "implementation", "spans", "work", "shape"),
    "inference": (
        *("part", "model", "allowed", "batch", "context", "context_by", "prompt", "streams"),
        *("frames", "rows", "requests", "chunk", "steps", "form", "attention"),
    ),
    "kills": ("kills", "seed", "steps"),
    "meshes": (
        *(
            "part",
            "mesh",
            "train",
            "rows",
            "steps",
            "length",
            "patches",
            "remat",
            "layers",
            "dtype",
        ),
        *("attend", "gated_delta_rule", "peak_lr", "at_once", "seed"),
    ),
    "pods": ("stage", "topology", "rows", "length", "patches", "tensor"),
    "prefill": ("parameters", "allowed", "prompt"),
    "projection": ("size", "rows", "implementation"),
    "projection_sweep": ("size", "rows", "plan"),
    "tpu_scores": ("op", "program", "topology", "length", "heads"),
    "train_step": (
        "stage",
        "train",
        "remat",
        "layers",
        "attend",
        "gated_delta_rule",
        "length",
        "patches",
        "dtype",
    ),
}


def add_commit(parser: argparse.ArgumentParser) -> None:
    """Add --commit. It is required if git cannot tell the commit, so that every line has one."""
    here = _git("describe", "--always", "--dirty", "--abbrev=12")
    text = (
        f"the commit that is measured (default: {here})"
        if here
        else "the commit that is measured (required: this folder has no git history)"
    )
    parser.add_argument("--commit", default=here, required=not here, help=text)


def record(name: str, commit: str, figures: dict, path: Path | None = None) -> dict:
    """Print a line and write it to a results file, where it replaces the line of its case.

    Args:
      name: the benchmark, a key of CASES.
      figures: the case and the measurements, as JSON values.
      path: default: benchmarks/results/NAME.jsonl.

    Returns the line: the figures with date, device, versions and commit.
    """
    content = {**circumstances(), "commit": commit, **figures}
    line = json.dumps(content)
    print(line, flush=True)  # first, in case the file cannot be written
    path = path or RESULTS / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = path.read_text("utf-8").splitlines() if path.exists() else []
    kept = [old for old in earlier if case(name, json.loads(old)) != case(name, content)]
    aside = path.with_name(path.name + ".partial")
    aside.write_text("".join(f"{text}\n" for text in (*kept, line)), "utf-8")
    aside.replace(path)
    return content


def case(name: str, line: dict) -> tuple[str, ...]:
    """The case of a line: its device and the values of the keys in CASES."""
    return tuple(json.dumps(line.get(key)) for key in ("device", *CASES[name]))


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages, by the names that pip uses."""
    return {package: importlib.metadata.version(package) for package in packages}


def circumstances() -> dict[str, str]:
    """Date, device and versions."""
    import jax

    kind = jax.devices()[0].device_kind
    device = f"{_processor()}, {os.cpu_count()} cores" if kind == "cpu" else kind
    return {
        "date": datetime.date.today().isoformat(),
        "device": device,
        "python": platform.python_version(),
        **versions("jax"),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=RESULTS.parent, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
