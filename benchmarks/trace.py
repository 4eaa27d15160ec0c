"""Where a GPU's time went: the kernels of a profiler trace, by share.

    python -m benchmarks.trace FOLDER              # a folder that --profile wrote, or jax.profiler.trace
    python -m benchmarks.trace FOLDER --top 60

Kernels whose names differ only in a number at the end count as one line; beside it stands what the longest of them came from.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData


class Kernel(NamedTuple):
    """One launch: its name, microseconds, and the operation of the program that it came from (empty if unknown)."""

    name: str
    us: float
    origin: str


def kernels(folder: str | Path) -> list[Kernel]:
    """All kernels that ran on GPUs in the newest trace of a folder."""
    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no trace in {folder}\n  -> name the folder that was given to --profile")
    found = []
    for plane in ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines if "GPU" in plane.name else ():
            if "Stream" not in line.name:
                continue
            for event in line.events:
                stats = {key: value for key, value in event.stats if key in ("name", "tf_op", "hlo_op")}
                origin = str(stats.get("name") or stats.get("tf_op") or stats.get("hlo_op") or "")
                found.append(Kernel(event.name, event.duration_ns / 1e3, origin))
    return found


def table(found: list[Kernel], top: int = 40) -> str:
    """A line for each kind of kernel: share, milliseconds, launches, name, origin of the longest."""
    kinds: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in found:
        kinds[re.sub(r"([._]\d+)+$", "", kernel.name)].append(kernel)
    total = sum(kernel.us for kernel in found)
    lines = [f"{total / 1e3:.2f} ms in {len(found)} kernels"]
    for name, group in sorted(kinds.items(), key=lambda item: -sum(k.us for k in item[1]))[:top]:
        us = sum(k.us for k in group)
        origin = max(group, key=lambda k: k.us).origin
        lines.append(f"{us / total:6.1%} {us / 1e3:9.3f} ms {len(group):6}  {name[:70]:70}  {origin[-120:]}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--top", type=int, default=40, help="lines")
    args = parser.parse_args()
    try:
        found = kernels(args.folder)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    print(table(found, args.top))


if __name__ == "__main__":
    main()
