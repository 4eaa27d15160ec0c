"""The parity matrix: every implementation of attention and of the gated delta rule against the
float64 reference, value and gradient, on the same cases; of their token steps and of projections
the value.

    # What this machine runs. On a CPU, kernels for TPUs are interpreted.
    python -m pallas_kernels.testing.matrix

    # Interprets those for Hopper too, with JAX 0.11.2 (see `mosaic_gpu_interpreter`).
    NPROC=64 python -m pallas_kernels.testing.matrix

    # On a GPU. Repeat the command until nothing is left.
    python -m pallas_kernels.testing.matrix --longest 100000 --record matrix.jsonl --minutes 9

    python -m pallas_kernels.testing.matrix --operator gated_delta_rule --case 'repeated|packed'
    python -m pallas_kernels.testing.matrix --only 'gated_delta_rule mosaic_gpu bfloat16 .*alike'

Prints one line a case and implementation: its largest error as a share of what is allowed, or the
reason it does not take the case. Exits with 1 where an error is too large. Errors are relative root
mean squares. float32 may have 1e-4, bfloat16 what `cells.ALLOWED` says. A result that must be exact
and is not has an infinite error.

Each cell is computed `--repeats` times: 20 on a GPU, once where kernels are interpreted. Between
two calls other work leaves NaN in the memory that the next one gets (see `disturb`). Every call
must be within what is allowed. All calls must be equal bit for bit, except for results that the
implementation declares `unordered`; otherwise the cell has an infinite error "repeats".

References are computed in float64 on the same device by XLA, at most 16 heads at a time. With
`--record` a cell that passed there is not computed again, and the summary is of the whole record.
Start a new record for changed code.
"""

import argparse
import re
import sys
import time
from functools import partial
from os import cpu_count
from pathlib import Path

import jax

from pallas_kernels.testing.cases import CASES
from pallas_kernels.testing.cells import IMPLEMENTATIONS, groups
from pallas_kernels.testing.comparison import compare, prepare
from pallas_kernels.testing.programs import ahead
from pallas_kernels.testing.record import Record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operator", choices=CASES, action="append", help="default: all")
    names = sorted({i.name for table in IMPLEMENTATIONS.values() for i in table})
    parser.add_argument(
        "--implementation", action="append", choices=names, help="only this one (several allowed)"
    )
    parser.add_argument(
        "--case", default="", help="only cases whose names match this regular expression"
    )
    parser.add_argument(
        "--only",
        default="",
        help='only cells whose names, "OPERATOR IMPLEMENTATION DTYPE CASE", match this one',
    )
    parser.add_argument("--longest", type=int, default=1000, help="leave out longer cases")
    parser.add_argument(
        "--repeats", type=int, help="calls of each cell; default 20 on a GPU, else 1"
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="threads that compile ahead; default one a core on a GPU, else none",
    )
    parser.add_argument(
        "--record",
        type=Path,
        help="append each cell to this file of JSON lines, and leave out those that passed in it",
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin no case after so long"
    )
    args = parser.parse_args()
    start, gpu, record = time.monotonic(), jax.default_backend() == "gpu", Record(args.record)
    repeats = args.repeats or (20 if gpu else 1)
    workers = args.workers if args.workers is not None else cpu_count() if gpu else 0
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def wanted(operator, implementation, dtype, case):
        name = f"{operator} {implementation.name} {dtype} {case}"
        if (
            args.implementation
            and implementation.name not in args.implementation
            or record.passed(name)
        ):
            return False
        return bool(re.search(args.case, case) and re.search(args.only, name))

    chosen = [
        g for o in args.operator or CASES for g in groups(o, args.longest, partial(wanted, o))
    ]
    left, operator = len(chosen), None
    for group, problem in ahead(chosen, partial(prepare, compiled=bool(workers)), workers):
        if time.monotonic() - start > 60 * args.minutes:
            break
        if group.operator != operator:
            operator = group.operator
            print(f"{operator} on {about['device']}, JAX {about['jax']}", flush=True)
        for cell in compare(group, problem, repeats):
            print(f"  {cell}", flush=True)
            facts = {
                "errors": {n: float(f"{e:.3g}") for n, e in cell.errors.items()},
                "differing": cell.differing,
                "repeats": repeats,
            }
            seconds = round(cell.seconds, 2)
            record.add(
                cell.name,
                cell.passed,
                str(cell),
                facts | {"refusal": cell.refusal, "seconds": seconds} | about,
            )
        left -= 1
    if not (left or record.ran()):
        sys.exit("nothing ran: no case of that name, or each was refused")
    if bad := record.bad():
        print(
            f"{len(bad)} too far from the reference, or not the same each time:",
            *bad,
            sep="\n",
            file=sys.stderr,
        )
    if left:
        print(f"{left} cases are left: the same command goes on with them", file=sys.stderr)
    if bad or left:
        sys.exit(1 if bad else 3)


if __name__ == "__main__":
    main()
