"""Record finished runs of examples/pixels_to_answers.py and print their means.

Example:

    python examples/pixels_to_answers.py --seed 0 --output runs/easy_vqa_0
    python examples/pixels_to_answers.py --seed 1 --output runs/easy_vqa_1
    python examples/pixels_to_answers.py --seed 2 --output runs/easy_vqa_2
    python -m benchmarks.easy_vqa runs/easy_vqa_0 runs/easy_vqa_1 runs/easy_vqa_2

Results go to benchmarks/results/easy_vqa.jsonl.
"""

import argparse
import json
from pathlib import Path

from benchmarks.record import add_commit, record

SHARES = (
    "held_out",
    "accuracy",
    "accuracy_not_yes_no",
    "blind_accuracy",
    "blind_accuracy_not_yes_no",
)


def figures(run: Path) -> dict:
    """results.json of a run, and the held-out accuracy at the end of its log."""
    results = json.loads((run / "results.json").read_text("utf-8"))
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    held_out = [line["held_out_exact"] for line in logged if "held_out_exact" in line]
    del results["device"]  # the recorder adds a more precise one
    return results | {"held_out": held_out[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, help="folders of runs that finished on this machine"
    )
    add_commit(parser)
    args = parser.parse_args()
    found = [figures(run) for run in args.runs]
    for run in found:
        record("easy_vqa", args.commit, run)
    for name in SHARES:
        print(f"{name:28} {sum(run[name] for run in found) / len(found):.2%}, mean of {len(found)}")


if __name__ == "__main__":
    main()
