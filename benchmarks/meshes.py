"""Training on meshes of one host's GPUs, compared with one GPU on the same rows.

Compared are losses, speed, memory and checkpoints.

Examples:

    # every mesh of all GPUs, and one GPU
    python -m benchmarks.meshes

    # some meshes
    python -m benchmarks.meshes --mesh fsdp=2 --mesh fsdp=2,tensor=2

    # the parts one by one, if the time of a command is limited
    python -m benchmarks.meshes one_gpu --rows 8
    python -m benchmarks.meshes meshes --mesh fsdp=4,tensor=2 \\
        --reuse benchmarks/results/meshes.jsonl

    # a small model in float32, which must agree to 1e-5
    python -m benchmarks.meshes float32

    # a checkpoint, written on the mesh and restored on one GPU
    python -m benchmarks.meshes checkpoint --mesh fsdp=2 --folder /tmp/checkpoint

`one_gpu` and `meshes` train the 4.4 B model with random parameters on synthetic rows of 8K tokens,
by default one row per GPU. One GPU processes the rows in turn and averages their gradients in
float32.

The noise of one GPU is the largest difference in loss, over all steps, between its run and a run
that differs only in the order of sums. `order` processes the rows in reverse order. `pairs`
processes two rows at a time, so that the sum over both is inside the matrix products, before the
rounding to bfloat16. A mesh passes if everything is finite and the loss of every step differs from
one GPU by at most `--factor` times that noise. Weak scaling is tokens/s per GPU over tokens/s of
one GPU with one row.

Each result is written to the output file as soon as it is known. The exit code is 1 if a part
failed.
"""

import argparse
import contextlib
import gc
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

# before jax, for its memory
from benchmarks.mesh_training import TRAINED, WARMUP, Setting, Training, one_gpu

import jax  # isort: skip
import numpy as np
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from benchmarks.mesh_checks import float32_agreement, restored_alone
from benchmarks.record import RESULTS, add_commit, circumstances, record
from benchmarks.step_timing import GRID
from benchmarks.train_step import LAYERS, add_compiler_options, starter
from infinitevl_jax.config.run import AXES, REMATS

PARTS = ("one_gpu", "meshes", "float32", "checkpoint")
NOISE = ("order", "pairs")
RESOLUTION = 1e-6  # relative, of a loss in float32: a smaller noise counts as this

Axes = Mapping[str, int]


class Results:
    """The output file, the problems so far, and the lines of an earlier call (`--reuse`)."""

    def __init__(self, path: Path, commit: str, reuse: Path | None = None):
        self.path, self.commit, self.problems = path, commit, []
        self.earlier = (
            [json.loads(line) for line in reuse.read_text("utf-8").splitlines()] if reuse else []
        )

    def write(self, part: str, setting: Setting, figures: dict) -> dict:
        """Write one line; a `problem` in it makes the program fail."""
        line = record(
            "meshes", self.commit, {"part": part, **setting.words(), **figures}, self.path
        )
        if "problem" in line:
            self.problems.append(f"{part} {named(line.get('mesh', {}))}: {line['problem']}")
        return line

    def found(self, part: str, setting: Setting) -> dict | None:
        """The newest earlier line of this part without a problem, for the same setting, device,
        versions and commit."""
        wanted = {"part": part, "commit": self.commit, **setting.words(), **circumstances()}
        del wanted["date"]
        matches = (
            line
            for line in reversed(self.earlier)
            if wanted.items() <= line.items() and "problem" not in line
        )
        return next(matches, None)

    def attempt(self, part: str, setting: Setting, axes: Axes, make: Callable[[], dict]) -> dict:
        """Write the result of `make`; an exception becomes the `problem`, and the other runs
        continue."""
        print(
            f"\n{part} {named(axes)}, {setting.rows} rows, {setting.at_once or setting.rows} at"
            " once",
            flush=True,
        )
        try:
            figures = make()
        except Exception as error:
            figures = {"problem": re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:400]}
        gc.collect()  # free the state of this run before the next one
        return self.write(part, setting, {"mesh": dict(axes), **figures})


def run_one_gpu(setting: Setting, begin, noise: Sequence[str], results: Results) -> None:
    """Speed with one row, losses of all rows, and the losses with other orders of sums."""
    single, in_turn = alone(setting)
    variants = [("speed", single), ("losses", in_turn)] + [
        (name, noisy(setting, name)) for name in noise
    ]
    for part, variant in variants:

        def make(part=part, variant=variant):
            batches = (
                [rows[::-1] for rows in variant.batches] if part == "order" else variant.batches
            )
            figures = Training(variant, {}, begin).train(batches).summary()
            return figures | not_finite(figures)

        if line := results.found(part, variant):
            print(f"\n{part}: of {line['date']}, from an earlier call", flush=True)
        else:
            results.earlier.append(results.attempt(part, variant, {}, make))


def run_meshes(
    setting: Setting,
    meshes: Sequence[Axes],
    begin,
    noise: Sequence[str],
    factor: float,
    results: Results,
    profile: str | None = None,
) -> None:
    """Compare each mesh with the lines of one GPU, which must exist."""
    single, in_turn = alone(setting)
    speed, reference = results.found("speed", single), results.found("losses", in_turn)
    others = {name: results.found(name, noisy(setting, name)) for name in noise}
    if missing := [
        name
        for name, line in {"speed": speed, "losses": reference, **others}.items()
        if line is None
    ]:
        results.problems.append(
            f"no result of one GPU to compare with: {', '.join(missing)}; run the part one_gpu"
            " first"
        )
        return
    measured = {name: difference(line["loss"], reference["loss"]) for name, line in others.items()}
    bound = factor * max(*measured.values(), RESOLUTION * max(reference["loss"]))
    print(
        f"\nnoise of one GPU: {measured}; allowed: {factor} times the larger, {bound:.2e}",
        flush=True,
    )
    for axes in meshes:

        def make(axes=axes):
            training = Training(setting, axes, begin).train(setting.batches)
            figures = training.summary() | {"noise": measured, "factor": factor, "bound": bound}
            figures |= verdict(figures, reference["loss"], bound)
            figures["weak_scaling"] = round(
                figures["tokens_per_s_per_device"] / speed["tokens_per_s_per_device"], 4
            )
            if profile:
                figures |= training.profile(str(Path(profile) / named(axes)))
            return figures

        results.attempt("mesh", setting, axes, make)


def alone(setting: Setting) -> tuple[Setting, Setting]:
    """One GPU's settings: one row for its speed, all rows in turn for their losses."""
    return replace(setting, rows=1, steps=min(setting.steps, 20)), one_gpu(setting)


def noisy(setting: Setting, name: str) -> Setting:
    """One GPU's setting for a kind of noise."""
    return one_gpu(setting, 2 if name == "pairs" else 1)


def difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest difference over all steps; NaN if one is NaN."""
    return float(np.max(np.abs(np.subtract(losses, reference))))


def verdict(figures: dict, reference: Sequence[float], bound: float) -> dict:
    """The largest difference in loss, its step, and the `problem` if there is one."""
    apart = np.abs(np.subtract(figures["loss"], reference))
    found = {
        "difference": float(np.max(apart)),
        "difference_at": int(np.argmax(apart)) + 1,
    } | not_finite(figures)
    if "problem" not in found and not found["difference"] <= bound:
        found["problem"] = (
            f"loss of step {found['difference_at']} is {found['difference']:.3g} off, allowed are"
            f" {bound:.3g}"
        )
    return found


def not_finite(figures: dict) -> dict:
    """The `problem` if a loss or gradient is NaN or infinite, else nothing."""
    for what in ("loss", "grad_norm"):
        if len(bad := np.flatnonzero(~np.isfinite(figures[what]))):
            return {"problem": f"the {what} of step {bad[0] + 1} is {figures[what][bad[0]]}"}
    return {}


def named(axes: Axes) -> str:
    """{"fsdp": 2, "tensor": 2} -> fsdp=2,tensor=2."""
    return ",".join(f"{axis}={size}" for axis, size in axes.items()) or "one"


def parse_mesh(text: str) -> dict[str, int]:
    """fsdp=2,tensor=2 -> {"fsdp": 2, "tensor": 2}."""
    axes = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or axis in axes or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r}: write axes among {', '.join(AXES[:3])} with their parts, such as"
                " fsdp=2,tensor=2"
            )
        axes[axis] = int(size)
    return axes


def all_meshes(devices: int) -> list[dict[str, int]]:
    """Meshes of all devices of a host: each axis alone, and fsdp with each other axis."""
    meshes = [{"data": devices}, {"fsdp": devices}] + (
        [{"tensor": devices}] if devices <= 4 else []
    )
    if devices >= 4 and devices % 2 == 0:
        meshes += [{"fsdp": devices // 2, "tensor": 2}, {"data": 2, "fsdp": devices // 2}]
    return meshes


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", help=f"among {', '.join(PARTS)}; default: one_gpu meshes"
    )
    parser.add_argument(
        "--mesh",
        type=parse_mesh,
        action="append",
        help="such as fsdp=2,tensor=2; may be repeated; default: all meshes of all GPUs",
    )
    parser.add_argument("--train", choices=TRAINED, default="mixers", help="default: mixers")
    parser.add_argument(
        "--rows",
        type=int,
        help="rows per step, over all GPUs; default: one per GPU of the largest mesh",
    )
    parser.add_argument("--steps", type=int, default=30, help="default: 30")
    parser.add_argument("--length", type=int, default=8192, help="tokens per row")
    parser.add_argument(
        "--patches", type=int, default=4096, help="image patches per row: a multiple of 1024"
    )
    parser.add_argument("--remat", choices=REMATS, default="dots", help="default: dots")
    parser.add_argument("--layers", choices=LAYERS, default="scanned", help="default: scanned")
    parser.add_argument(
        "--attend", help='implementations of attention, in order, such as "mosaic_gpu,xla"'
    )
    parser.add_argument("--gated-delta-rule", help="implementations of the gated delta rule")
    parser.add_argument(
        "--noise", nargs="+", choices=NOISE, default=list(NOISE), help="default: both"
    )
    parser.add_argument(
        "--factor",
        type=float,
        default=4.0,
        help="allowed difference in loss, in multiples of the noise (default: 4)",
    )
    parser.add_argument(
        "--profile",
        help=(
            "write a profiler trace of two steps of each mesh to this folder, and record the share"
            " of time in collectives"
        ),
    )
    parser.add_argument(
        "--folder",
        help="where `checkpoint` writes (19 GB with --train mixers); removed afterwards",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "meshes.jsonl",
        help="default: benchmarks/results/meshes.jsonl",
    )
    parser.add_argument(
        "--reuse",
        type=Path,
        help="a results file; lines of one GPU with the same setting are taken from it",
    )
    parser.add_argument(
        "--compilation-cache",
        help="a folder for compiled programs; default: a temporary one",
    )
    add_compiler_options(parser)
    add_commit(parser)
    args = parser.parse_args(argv)
    args.parts = args.parts or ["one_gpu", "meshes"]
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]!r}: choose of {', '.join(PARTS)}")
    args.mesh = args.mesh or all_meshes(len(jax.devices()))
    sizes = [math.prod(axes.values()) for axes in args.mesh]
    if max(sizes) > len(jax.devices()):
        parser.error(
            f"--mesh {named(args.mesh[int(np.argmax(sizes))])} needs {max(sizes)} devices, this"
            f" machine has {len(jax.devices())}"
        )
    args.rows = args.rows or max(sizes)
    for axes in args.mesh:
        if args.rows % (parts := axes.get("data", 1) * axes.get("fsdp", 1)):
            parser.error(
                f"--rows {args.rows} does not divide over the {parts} parts of {named(axes)}"
            )
    if args.rows % 2:
        parser.error(
            f"--rows {args.rows}: give an even number so that `pairs` can sum in another order"
        )
    if args.patches % math.prod(GRID):
        parser.error(f"--patches {args.patches}: give a multiple of {math.prod(GRID)}, an image")
    if args.steps <= WARMUP:
        parser.error(f"--steps {args.steps}: the first {WARMUP} are not timed, more are needed")
    return args


@contextlib.contextmanager
def compilation_cache(folder: str | None) -> Iterator[None]:
    """Reuse compiled programs within this run, or across runs with the same folder."""
    with tempfile.TemporaryDirectory() as own:
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", folder or own)
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
            jax_cache.reset_cache()


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    args = arguments(argv)
    setting = Setting(
        train=args.train,
        rows=args.rows,
        steps=args.steps,
        length=args.length,
        images=args.patches // math.prod(GRID),
        remat=args.remat,
        layers=args.layers,
        attend=args.attend,
        gated_delta_rule=args.gated_delta_rule,
        compiler_options=tuple(args.compiler_option),
    )
    results = Results(args.output, args.commit, args.reuse)
    with compilation_cache(args.compilation_cache):
        if "float32" in args.parts:
            float32_agreement(args.mesh, args.rows, results)
        begin = starter(setting.config)
        if "one_gpu" in args.parts:
            run_one_gpu(setting, begin, args.noise, results)
        if "meshes" in args.parts:
            run_meshes(setting, args.mesh, begin, args.noise, args.factor, results, args.profile)
        if "checkpoint" in args.parts:
            for axes in args.mesh:
                results.attempt(
                    "checkpoint",
                    setting,
                    axes,
                    lambda axes=axes: restored_alone(setting, axes, begin, args.folder),
                )
    for problem in results.problems:
        print(f"FAILED {problem}", flush=True)
    print(
        "all within bounds" if not results.problems else f"{len(results.problems)} failed",
        flush=True,
    )
    return 1 if results.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
