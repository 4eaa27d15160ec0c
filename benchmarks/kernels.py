"""All kernels in one go, correctness first, then a table of what was measured.

    python -m benchmarks.kernels            # on a GPU: parity matrix, then attention, gated delta rule and token steps beside their peers
    python -m benchmarks.kernels            # on a CPU: static scores for four generations of TPU; on a TPU: parity matrix first
    python -m benchmarks.kernels --table    # only the table, of the newest line recorded for each case

Each part is a command of its own (`python -m benchmarks.attend --help` and so on) and appends to benchmarks/results/. A matrix with an
error too large ends the run before anything is timed.
"""

import argparse
import json
import subprocess
import sys

from benchmarks.record import RESULTS, add_commit

GPU = ("attend", "gated_delta_rule", "decode")
CPU = ("tpu_scores",)
TIMES = ("ms", "us", "estimate_ms", "failed")


def newest(name: str, *keys: str) -> dict[tuple, dict]:
    """The last line of a results file for each combination of the keys: those with a time, of a commit."""
    file = RESULTS / f"{name}.jsonl"
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    return {tuple(str(line.get(key)) for key in keys): line for line in lines if line.get("commit") and not line.keys().isdisjoint(TIMES)}


def table() -> str:
    """Markdown: milliseconds of each implementation, side by side."""
    rows: dict[tuple, dict] = {}
    for line in newest("attend", "implementation", "work", "length").values():
        rows.setdefault(("attend", line["work"], f"1 x {line['length']:,}"), {})[line["implementation"]] = line["ms"]["median"]
    for line in newest("gated_delta_rule", "implementation", "work", "shape").values():
        batch, length = line["shape"]
        rows.setdefault(("gated_delta_rule", line["work"], f"{batch} x {length:,}"), {})[line["implementation"]] = line["ms"]["median"]
    for line in newest("decode", "op", "implementation", "batch").values():
        rows.setdefault((line["op"], "token", f"{line['batch']} x 1"), {})[line["implementation"]] = line["us"]["median"] / 1e3
    names = sorted({name for times in rows.values() for name in times}, key=lambda n: (n != "mosaic_gpu", n))
    text = [f"| operator | work | batch x length | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for (operator, work, shape), times in rows.items():
        text.append(f"| {operator} | {work} | {shape} | " + " | ".join(f"{times[n]:.3g}" if n in times else "" for n in names) + " |")
    text += ["", "| operator | program | " + " | ".join(chips := ["v5e", "v5p", "v6e", "tpu7x"]) + " |", "|---" * 6 + "|"]
    scores: dict[tuple, dict] = {}
    for line in newest("tpu_scores", "op", "program", "topology").values():
        scores.setdefault((line["op"], line["program"]), {})[line["topology"].split(":")[0]] = line.get("estimate_ms", "does not compile")
    for (operator, program), found in scores.items():
        text.append(f"| {operator} | {program} | " + " | ".join(str(found.get(chip, "")) for chip in chips) + " |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--longest", type=int, default=100_000, help="longest case of the parity matrix")
    add_commit(parser)
    args = parser.parse_args()
    if not args.table:
        # in a process of its own: a client in this one would keep the device, or most of its memory, from those below
        ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
        backend = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[-1]
        if backend != "cpu":
            _run("pallas_kernels.testing.matrix", "--longest", str(args.longest))
        for part in GPU if backend == "gpu" else CPU:
            _run(f"benchmarks.{part}", "--commit", args.commit)
    print(table())


def _run(module: str, *arguments: str) -> None:
    """A process for each part, so that each has the whole device."""
    if subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode:
        sys.exit(f"{module} failed; what comes after it was not run")


if __name__ == "__main__":
    main()
