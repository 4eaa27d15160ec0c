"""Runs NVIDIA's compute-sanitizer on a few small cells of the parity matrix, for the Hopper kernels
alone.

    # racecheck and initcheck
    python -m pallas_kernels.testing.sanitize

    python -m pallas_kernels.testing.sanitize --tool memcheck --tool synccheck \\
        --sanitizer /usr/local/cuda/bin/compute-sanitizer

First each tool runs on kernels that are wrong on purpose (`wrong_kernels`). A tool that finds
nothing in them cannot see into what Mosaic GPU compiles to, so its other results mean nothing: the
command then ends with an error. It prints a line a tool, then each kind of finding once with its
count, and ends with an error if there are findings, except in kernels of XLA: initcheck does not
see what bulk copies write, so it reports every kernel of XLA that reads an output of ours. The full
output goes to `--log`.

compute-sanitizer comes with CUDA, or by `pip install nvidia-cuda-sanitizer-api`. Programs run tens
to hundreds of times slower in it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

TOOLS = "racecheck", "initcheck", "synccheck", "memcheck"
# The argument of `wrong_kernels` for a tool.
CONTROLS = {"racecheck": "race", "initcheck": "uninitialised"}
CELLS = (
    "^(attention mosaic_gpu bfloat16 (window, 65|packed, 300|ring, 65 x 128)|gated_delta_rule"
    " mosaic_gpu bfloat16 (gates spread, 65|gates mild, alike|packed, 300)|attention_step"
    " mosaic_gpu bfloat16 two tokens|gated_delta_rule_step mosaic_gpu bfloat16 two tokens, 6"
    "|projection mosaic_gpu bfloat16 (in four|gated, two))"
)
OPTIONS = {  # that newer versions have
    "--check-exit-code": "no",  # the matrix's own says something else
    "--check-tensor-ops": "yes",
    "--check-warpgroup-mma": "yes",
    "--initcheck-address-space": "all",
}
# Each array in an allocation of its own, which the tools tell from others, and no graphs.
XLA = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_FLAGS": "--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0",
}


def command(sanitizer: str, tool: str, known: str, python: list[str]) -> list[str]:
    """The command line that runs Python under a tool. known: the output of the sanitizer's --help,
    for options that not all versions have."""
    options = [
        f"--tool={tool}",
        "--print-limit=100000",
        "--show-backtrace=no",  # of each finding: it takes most of the time
        "--target-processes=application-only",
    ]
    if tool != "initcheck":  # which must see what XLA's kernels write
        options.append("--kernel-name=kns=mosaic_gpu")
    mine = {
        name: value
        for name, value in OPTIONS.items()
        if not name.startswith("--initcheck") or tool == "initcheck"
    }
    options += [f"{name}={value}" for name, value in mine.items() if name in known]
    return [sanitizer, *options, sys.executable, *python]


def findings(said: str) -> tuple[int | None, Counter]:
    """The number of findings in a tool's summary (None: it wrote no summary), and the lines about
    them by kind, with the kernel if it is on the next line."""
    totals = re.findall(r"SUMMARY: (\d+) (?:hazard|error)", said)
    kinds, lines = Counter(), said.splitlines()
    for line, following in pairwise([*lines, ""]):
        if found := re.match(
            r"=+ ((?:Error|Warning|Invalid|Uninitialized|Barrier|Potential)\b.*)", line
        ):
            kind = re.sub(r"0x[0-9a-f]+|\b\d+\b", "_", found[1])
            kernel = re.match(r"=+ +at (\w+)", following)
            kinds[f"{kind} at {kernel[1]}" if kernel else kind] += 1
    return (sum(map(int, totals)) if totals else None), kinds


def elsewhere(kind: str) -> bool:
    """Whether a kind of finding is in a kernel that is not ours."""
    return " at " in kind and "mosaic_gpu" not in kind


def wrong_kernels(kind: str) -> None:
    """Runs a kernel in which two warpgroups write one place ("race"), or one that reads memory that
    was never written ("uninitialised")."""
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows = jax.ShapeDtypeStruct((2, 128), jnp.float32)
    how = {"num_threads": 2, "thread_name": "group"}

    def race(out_ref):
        def body(memory):
            group = lax.axis_index("group")
            memory[...] = jnp.full((128,), group.astype(jnp.float32))
            out_ref[group] = memory[...]

        pl.run_scoped(body, plgpu.SMEM((128,), jnp.float32), collective_axes="group")

    def half(out_ref):
        @pl.when(lax.axis_index("group") == 0)
        def _():
            out_ref[0] = jnp.zeros(128, jnp.float32)

    def double(x_ref, out_ref):
        group = lax.axis_index("group")
        out_ref[group] = 2 * x_ref[group]

    def run():
        if kind == "race":
            return plgpu.kernel(race, out_type=rows, kernel_name="race", **how)()
        return plgpu.kernel(double, out_type=rows, **how)(
            plgpu.kernel(half, out_type=rows, kernel_name="half", **how)()
        )

    print(jax.block_until_ready(jax.jit(run)()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tool", action="append", choices=TOOLS, help="default: racecheck and initcheck"
    )
    parser.add_argument("--only", default=CELLS, help="cells of the matrix, as its own --only")
    parser.add_argument(
        "--sanitizer", default="compute-sanitizer", help="the program, if it is not on the path"
    )
    parser.add_argument("--seconds", type=float, default=240, help="at most so long for a tool")
    parser.add_argument("--log", type=Path, default=Path("sanitize.log"))
    parser.add_argument("--wrong", choices=sorted(CONTROLS.values()), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.wrong:
        return wrong_kernels(args.wrong)
    if not (sanitizer := shutil.which(args.sanitizer)):
        sys.exit(
            f"{args.sanitizer} is not there\n  -> pip install nvidia-cuda-sanitizer-api, or name it"
            " by --sanitizer"
        )
    known, bad = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout, False

    def run(tool: str, *python: str) -> tuple[int | None, Counter]:
        line = command(sanitizer, tool, known, ["-m", *python])
        try:
            done = subprocess.run(
                line, env=os.environ | XLA, capture_output=True, text=True, timeout=args.seconds
            )
            said = done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            said = (
                "".join((x or b"").decode(errors="replace") for x in (error.stdout, error.stderr))
                + f"\nnot done after {args.seconds} s"
            )
        with args.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(line)}\n{said}\n")
        return findings(said)

    for tool in args.tool or TOOLS[:2]:
        if tool in CONTROLS:
            total, _ = run(tool, "pallas_kernels.testing.sanitize", "--wrong", CONTROLS[tool])
            bad |= not total
            verdict = {
                None: f"it did not run, see {args.log}",
                0: "BLIND: it finds nothing in a wrong kernel",
            }
            print(f"{tool}, control: {verdict.get(total, 'it finds what is wrong')}", flush=True)
        total, kinds = run(
            tool,
            "pallas_kernels.testing.matrix",
            "--repeats",
            "1",
            "--workers",
            "0",
            "--only",
            args.only,
        )
        theirs = sum(count for kind, count in kinds.items() if elsewhere(kind))
        bad |= total != theirs
        outcome = f"it came to no summary, see {args.log}" if total is None else f"{total} findings"
        print(f"{tool}: {outcome}, {theirs} of them in kernels of XLA", flush=True)
        for kind, count in kinds.most_common():
            print(f"  {count:5} x {kind}", flush=True)
    sys.exit(bad)


if __name__ == "__main__":
    main()
