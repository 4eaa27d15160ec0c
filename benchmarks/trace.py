"""The kernels of a profiler trace of a GPU, by share of time.

Examples:

    # a folder written by --profile or by jax.profiler.trace
    python -m benchmarks.trace FOLDER

    # more lines
    python -m benchmarks.trace FOLDER --top 60

Kernels whose names differ only in a number at the end are one line, with the origin of the longest.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

# kernels that move data between GPUs: NCCL's, XLA's own for small sums, and copies
COLLECTIVE = re.compile(
    r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all|memcpyp2p", re.IGNORECASE
)


class Kernel(NamedTuple):
    """One launch.

    Attributes:
      us, start: in microseconds.
      origin: the operation of the program that it came from; "" if unknown.
      device: the GPU.
    """

    name: str
    us: float
    origin: str
    device: str = ""
    start: float = 0.0


def kernels(folder: str | Path) -> list[Kernel]:
    """All kernels that ran on GPUs in the newest trace of a folder."""
    files = sorted(Path(folder).rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(
            f"no trace in {folder}\n  -> name the folder that was given to --profile"
        )
    found = []
    for plane in ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines if "GPU" in plane.name else ():
            if "Stream" not in line.name:
                continue
            for event in line.events:
                stats = {
                    key: value for key, value in event.stats if key in ("name", "tf_op", "hlo_op")
                }
                origin = str(stats.get("name") or stats.get("tf_op") or stats.get("hlo_op") or "")
                found.append(
                    Kernel(
                        event.name,
                        event.duration_ns / 1e3,
                        origin,
                        plane.name,
                        event.start_ns / 1e3,
                    )
                )
    return found


def collective_share(found: list[Kernel]) -> dict[str, float]:
    """Shares of the GPUs' busy time spent in collectives, averaged over GPUs; {} without kernels.

    `collectives`: share in which a collective ran, including its wait for other GPUs.
    `collectives_alone`: share in which only collectives ran, which overlap could save.
    """
    devices: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in found:
        devices[kernel.device].append(kernel)
    shares, alone = [], []
    for kernels_there in devices.values():
        busy = covered(kernels_there)
        moving = [kernel for kernel in kernels_there if COLLECTIVE.search(kernel.name)]
        others = [kernel for kernel in kernels_there if not COLLECTIVE.search(kernel.name)]
        shares.append(covered(moving) / busy)
        alone.append((busy - covered(others)) / busy)
    if not shares:
        return {}
    return {"collectives": sum(shares) / len(shares), "collectives_alone": sum(alone) / len(alone)}


def covered(found: list[Kernel]) -> float:
    """Microseconds in which at least one of the kernels ran."""
    total, end = 0.0, float("-inf")
    for kernel in sorted(found, key=lambda k: k.start):
        stop = kernel.start + kernel.us
        total += max(0.0, stop - max(end, kernel.start))
        end = max(end, stop)
    return total


def table(found: list[Kernel], top: int = 40) -> str:
    """A line per kind of kernel: share, milliseconds, launches, name, origin of the longest."""
    kinds: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in found:
        kinds[re.sub(r"([._]\d+)+$", "", kernel.name)].append(kernel)
    total = sum(kernel.us for kernel in found)
    lines = [f"{total / 1e3:.2f} ms in {len(found)} kernels"]
    for name, group in sorted(kinds.items(), key=lambda item: -sum(k.us for k in item[1]))[:top]:
        us = sum(k.us for k in group)
        origin = max(group, key=lambda k: k.us).origin
        lines.append(
            f"{us / total:6.1%} {us / 1e3:9.3f} ms {len(group):6}  {name[:70]:70}  {origin[-120:]}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="the folder of the trace")
    parser.add_argument("--top", type=int, default=40, help="number of lines (default: 40)")
    args = parser.parse_args()
    try:
        found = kernels(args.folder)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    print(table(found, args.top))


if __name__ == "__main__":
    main()
