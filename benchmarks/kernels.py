"""All kernels: correctness first, then times, then the tables of docs/kernels.md.

Examples:

    # on a GPU: parity matrix, then attention, gated delta rule and token steps beside their peers
    # on a CPU: static scores for four generations of TPU
    # on a TPU: parity matrix, then the static scores
    python -m benchmarks.kernels

    # only the tables
    python -m benchmarks.kernels --table

The tables hold the newest recorded line of each case. They are printed and written to
docs/kernels.md. Each part is a command of its own (`python -m benchmarks.attend --help` and so on)
and records in benchmarks/results/. If the parity matrix fails, nothing is timed.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

from benchmarks.record import RESULTS, add_commit
from pallas_kernels.testing.static_score import CHIPS

GPU = ("attend", "gated_delta_rule", "decode")
CPU = ("tpu_scores",)
DOCUMENT = RESULTS.parent.parent / "docs" / "kernels.md"
BEGIN, END = (
    "<!-- python -m benchmarks.kernels --table writes what follows -->",
    "<!-- up to here -->",
)
TIMES = ("ms", "us", "estimate_ms", "failed")


def newest(name: str, *keys: str, device: str | None = None) -> dict[tuple, dict]:
    """The last line of a results file for each combination of the keys.

    Only lines with a time and a commit count; if `device` is given, only those of that device.
    """
    file = RESULTS / f"{name}.jsonl"
    lines = (
        [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    )
    lines = [
        line
        for line in lines
        if line.get("commit")
        and not line.keys().isdisjoint(TIMES)
        and device in (None, line["device"])
    ]
    return {tuple(str(line.get(key)) for key in keys): line for line in lines}


def tables() -> str:
    """Markdown: milliseconds per device with a row per implementation; scores for TPUs."""
    devices = sorted({key for name in GPU for (key,) in newest(name, "device")})
    measured = [f"{device}, milliseconds:\n\n{times(device)}" for device in devices]
    return "\n\n".join([*measured, f"TPU, by the compiler, milliseconds / floor:\n\n{scores()}"])


def times(device: str) -> str:
    """A table of sequences by length and a table of token steps by batch."""
    sequences: dict[tuple, dict] = {}
    for line in newest(
        "attend", "case", "implementation", "work", "length", device=device
    ).values():
        operator = " ".join(["attend", *line.get("case", "").split("_")]).strip()
        sequences.setdefault((operator, line["work"], line["implementation"]), {})[
            1, line["length"]
        ] = line["ms"]["median"]
    for line in newest(
        "gated_delta_rule", "heads", "implementation", "work", "shape", device=device
    ).values():
        operator = (
            "gated_delta_rule"
            if line["heads"] == 16
            else f"gated_delta_rule, {line['heads']} heads"
        )
        sequences.setdefault((operator, line["work"], line["implementation"]), {})[
            tuple(line["shape"])
        ] = line["ms"]["median"]
    tokens: dict[tuple, dict] = {}
    for line in newest("decode", "op", "implementation", "batch", device=device).values():
        tokens.setdefault((line["op"], line["implementation"]), {})[line["batch"]] = (
            line["us"]["median"] / 1e3
        )
    return (
        _grid(sequences, ("operator", "work", "by"), _shape)
        + "\n\n"
        + _grid(tokens, ("a layer's", "by"), "batch {}".format)
    )


def scores() -> str:
    """A column per generation of TPU: the estimate / its lower bound, bytes over the HBM rate."""
    rows: dict[tuple, dict] = {}
    chips = list(CHIPS)
    for line in newest("tpu_scores", "op", "program", "topology").values():
        chip = chips.index(line["topology"].split(":")[0])
        rows.setdefault((line["op"], line["program"]), {})[chip] = _score(line, chips[chip])
    return _grid(rows, ("operator", "program"), chips.__getitem__)


def _score(line: dict, chip: str) -> str:
    if "failed" in line:
        return "does not compile"
    return (
        f"{_figure(line['estimate_ms'])} / {_figure(1e3 * line['bytes'] / CHIPS[chip].bandwidth)}"
    )


def _shape(shape: tuple[int, int]) -> str:
    batch, length = shape
    return f"{length // 1024}K" if batch == 1 else f"{batch} x {length // 1024}K"


def _grid(rows: dict[tuple, dict], names: tuple[str, ...], title: Callable) -> str:
    """A table with a column for each key of the rows' figures.

    Among rows that differ only in the implementation, `mosaic_gpu` comes first.
    """
    columns = sorted({column for found in rows.values() for column in found})
    text = [
        "| " + " | ".join([*names, *map(title, columns)]) + " |",
        "|---" * (len(names) + len(columns)) + "|",
    ]
    for key, found in sorted(
        rows.items(), key=lambda row: (row[0][:-1], row[0][-1] != "mosaic_gpu", row[0][-1])
    ):
        text.append("| " + " | ".join([*key, *(_figure(found.get(c, "")) for c in columns)]) + " |")
    return "\n".join(text)


def _figure(x: float | str) -> str:
    return x if isinstance(x, str) else f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


def write_tables() -> None:
    """Write the tables into the document, between its two marks."""
    before, rest = DOCUMENT.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    aside = DOCUMENT.with_suffix(".tmp")
    aside.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", "utf-8")
    aside.replace(DOCUMENT)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="write the tables only")
    parser.add_argument(
        "--longest", type=int, default=100_000, help="longest case of the parity matrix"
    )
    add_commit(parser)
    args = parser.parse_args()
    if not args.table:
        # in a separate process: a client in this one would hold the device or most of its memory
        ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
        backend = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[-1]
        if backend != "cpu":
            _run("pallas_kernels.testing.matrix", "--longest", str(args.longest))
        for part in GPU if backend == "gpu" else CPU:
            _run(f"benchmarks.{part}", "--commit", args.commit)
    print(tables())
    write_tables()


def _run(module: str, *arguments: str) -> None:
    """Run a part in its own process, so that it has the whole device."""
    if subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode:
        sys.exit(f"{module} failed; the parts after it did not run")


if __name__ == "__main__":
    main()
