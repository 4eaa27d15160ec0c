"""The command: see the package's own words."""

import argparse
import json
import random
import sys
import tempfile
import traceback
from pathlib import Path

from . import __doc__ as about
from .campaign import environment, plan, run
from .kinds import WEIGHTS
from .report import GOOD, summary, table


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutations",
        description=about,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=5000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--kind",
        choices=sorted(WEIGHTS),
        action="append",
        help="this kind alone; may be given several times",
    )
    parser.add_argument(
        "--case",
        metavar="KIND:SEED",
        help="run one input again in this process, and show the traceback",
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--root", type=Path, help="a scratch folder to keep; by default a temporary one"
    )
    parser.add_argument(
        "--failures",
        type=Path,
        default=Path("mutations.jsonl"),
        help="where findings go, one JSON line each",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mutations-") as temporary:
        root = (options.root or Path(temporary)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        return again(options.case, root) if options.case else campaign(options, root)


def campaign(options, root: Path) -> int:
    from tqdm import tqdm

    chosen = {name: WEIGHTS[name] for name in options.kind or WEIGHTS}
    cases, results = plan(options.count, options.seed, chosen), []
    everything, findings = root / "results.jsonl", options.failures
    with (
        tqdm(total=len(cases), unit="input") as bar,
        everything.open("w") as all_results,
        findings.open("w") as failures,
    ):
        for result in run(cases, root, options.workers):
            results.append(result)
            all_results.write(json.dumps(result) + "\n")
            if result["verdict"] not in GOOD:
                failures.write(json.dumps(result) + "\n")
                failures.flush()
            bar.update()
            bar.set_postfix(findings=sum(r["verdict"] not in GOOD for r in results))
    if findings := summary(results):
        print(findings)
    print(table(results))
    return int(any(r["verdict"] not in GOOD for r in results))


def again(case: str, root: Path) -> int:
    """One case, unwatched: its label, and the result or the traceback."""
    import os

    os.environ.update(
        {k: v for k, v in environment(root, 0).items() if k not in ("HOME", "PYTHONPATH")}
    )
    from .kinds import KINDS
    from .worker import prepare

    name, _, seed = case.partition(":")
    place, _ = prepare(root, 0)
    place.clear()
    made = KINDS[name](random.Random(f"{name}:{int(seed)}"), place)
    print(made.label)
    try:
        wrong = made.check(made.action())
    except BaseException:
        traceback.print_exc()
        return 1
    print(wrong or "right")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
