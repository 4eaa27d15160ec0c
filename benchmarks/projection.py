"""Projections of a few rows, as a decoded token does them, on one Hopper GPU: the kernel beside XLA
and beside the rate of a copy.

Examples:

    # every product of the 4.4 B model for 1, 8 and 16 rows
    python -m benchmarks.projection

    # try the sizes of tiles first, then measure with the best of each product
    python -m benchmarks.projection --sweep

    # one product
    python -m benchmarks.projection --sizes down head --rows 1

One program multiplies several x by a matrix each, all of the same size and together several times
larger than the L2 cache, so that each is read from memory. From the profiler: microseconds a
product in kernels (kernel_us), and from the first kernel's start to the last one's end, gaps
included (us). GB/s counts the matrix alone. share is that over the rate of a copy in the same run,
read and written bytes counted.

What is timed has been checked: errors against float32 are at most 0.5 %, a second run has the same
bits, and a row has the same bits whatever the number of rows. Results go to
benchmarks/results/projection.jsonl, those of a sweep to projection_sweep.jsonl. The sizes in
pallas_kernels/projection/tuning.py are then to be set by hand.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict

import jax
import jax.numpy as jnp

from benchmarks.record import add_commit, record
from benchmarks.timing import compiled
from benchmarks.trace import Kernel, kernels
from pallas_kernels.projection import reference, xla
from pallas_kernels.projection.hopper import plan as plans
from pallas_kernels.projection.hopper.plan import Plan
from pallas_kernels.projection.hopper.projection import projection
from pallas_kernels.testing.cases.projection import PUBLISHED

L2 = 50 * 2**20
REPEATS = 5  # runs of a program in a trace
ALLOWED = 5e-3
COPIED = 2**30  # bytes of the array whose copy gives the rate
MOST = 16  # rows

bf16 = jnp.bfloat16


def candidates(size: str) -> list[Plan]:
    """The plans to try for a product, the chosen one first."""
    inputs, outputs, around = PUBLISHED[size]
    gated = around.get("gated", False)
    chosen = plans.choose(inputs, outputs, gated)
    tried = [
        Plan(rows, blocks, flight * 1024, splits, plans.PLACES[splits])
        for rows, blocks, flight, splits in itertools.product(
            (64, 128, 256), (1, 2), (32, 48, 64, 160), (1, 2, 4)
        )
    ]
    fits = [p for p in tried if p.refusal(MOST, inputs, outputs, gated) is None and p != chosen]
    return [chosen, *fits]


def matrices(size: str) -> int:
    """So many matrices are several times as large as the L2 cache."""
    return max(2, -(-5 * L2 // matrix_bytes(size)))


def matrix_bytes(size: str) -> int:
    inputs, outputs, around = PUBLISHED[size]
    return 2 * inputs * outputs * (2 if around.get("gated") else 1)


def shapes(size: str, rows: int) -> tuple[list, dict, list]:
    """Of the x, of what stands around the product, and of the matrices."""
    inputs, outputs, around = PUBLISHED[size]
    pair = (2,) if around.get("gated") else ()
    given = {"bias": (*pair, outputs)} if around.get("bias") else {}
    given |= {"residual": (rows, outputs)} if around.get("residual") else {}
    given |= {"norm": (inputs,)} if around.get("norm") else {}
    weight = (*pair, outputs, inputs) if around.get("transposed") else (inputs, *pair, outputs)
    shaped = {name: jax.ShapeDtypeStruct(shape, bf16) for name, shape in given.items()}
    # Products of one x would be merged by XLA.
    xs, weights = (
        [jax.ShapeDtypeStruct(shape, bf16)] * matrices(size) for shape in ((rows, inputs), weight)
    )
    return xs, shaped, weights


def draw(size: str) -> tuple[list, dict, list]:
    """Arrays of those shapes, for `MOST` rows."""
    xs, given, weights = shapes(size, MOST)
    keys = iter(jax.random.split(jax.random.key(0), len(xs) + len(given) + len(weights)))
    normal = jax.jit(
        lambda key, scale, shape: (scale * jax.random.normal(key, shape)).astype(bf16),
        static_argnums=2,
    )
    xs = [normal(next(keys), 1.0, x.shape) for x in xs]
    around = {name: normal(next(keys), 1.0, x.shape) for name, x in given.items()}
    scale = PUBLISHED[size][0] ** -0.5
    return xs, around, [normal(next(keys), scale, w.shape) for w in weights]


def first_rows(drawn: tuple[list, dict, list], rows: int) -> tuple[list, dict, list]:
    xs, around, weights = drawn
    around = {name: x[:rows] if name == "residual" else x for name, x in around.items()}
    return [x[:rows] for x in xs], around, weights


def program(run: Callable, size: str) -> Callable:
    """A jitted program that multiplies each x by its matrix."""
    transposed = PUBLISHED[size][2].get("transposed", False)
    return jax.jit(
        lambda xs, around, weights: [
            run(x=x, weight=weight, transposed=transposed, **around)
            for x, weight in zip(xs, weights, strict=True)
        ]
    )


def by_plan(plan: Plan) -> Callable:
    return lambda **arrays: projection(**arrays, plan=plan)


@jax.jit
def error(got: jax.Array, want: jax.Array) -> jax.Array:
    """Relative root mean square."""
    return jnp.sqrt(jnp.mean((got.astype(jnp.float32) - want) ** 2) / jnp.mean(want**2))


def wanted(size: str, xs: list, around: dict, weights: list) -> jax.Array:
    """The first product in float32."""
    transposed = PUBLISHED[size][2].get("transposed", False)
    run = jax.jit(reference.projection, static_argnames="transposed")
    given = {"x": xs[0], "weight": weights[0], **around}
    return run(**{n: x.astype(jnp.float32) for n, x in given.items()}, transposed=transposed)


def check(outs: list, again: list, want: jax.Array, more_rows: list | None) -> float:
    """The error of the first result.

    more_rows: the same products with more rows. Raises ValueError where results are wrong, or
    differ between two runs or from those of more rows.
    """
    found = float(error(outs[0], want))
    if not found <= ALLOWED:
        raise ValueError(f"not timed: error {found:.2g} of at most {ALLOWED}")
    if not all(map(same_bits, outs, again)):
        raise ValueError("not timed: a second run has other bits")
    if more_rows is not None and not all(
        same_bits(few, more[: len(few)]) for few, more in zip(outs, more_rows, strict=True)
    ):
        raise ValueError("not timed: rows have other bits when they are more")
    return found


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    return bool(jnp.all(a.view(jnp.uint16) == b.view(jnp.uint16)))


def traced(runs: list[Callable[[], list]]) -> list[Kernel]:
    """The kernels of these calls, in order."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for run in runs:
                jax.block_until_ready(run())
        return sorted(kernels(folder), key=lambda kernel: kernel.start)


def times(found: list[Kernel], runs: int, products: int) -> list[dict[str, float]]:
    """For each of `runs` equal programs, one after the other: microseconds a product in kernels,
    with gaps, and kernels a product."""
    each, odd = divmod(len(found), runs)
    if odd or not each:
        raise ValueError(f"{len(found)} kernels of {runs} equal programs: not a whole number each")
    parts = [found[i * each : (i + 1) * each] for i in range(runs)]
    return [
        {
            "kernel_us": sum(kernel.us for kernel in part) / products,
            "us": (part[-1].start + part[-1].us - part[0].start) / products,
            "kernels": each / products,
        }
        for part in parts
    ]


def median(figures: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: round(statistics.median(figure[name] for figure in figures), 2) for name in figures[0]
    }


def copy_rate() -> float:
    """GB/s of a copy, read and written bytes counted."""
    x = jnp.zeros(COPIED // 4, jnp.int32)
    run = jax.jit(lambda x: x + 1)
    jax.block_until_ready(run(x))
    found = times(traced([lambda: run(x)] * REPEATS), REPEATS, 1)
    return 2 * COPIED / median(found)["kernel_us"] / 1e3


def rates(size: str, figures: dict, copied: float) -> dict:
    """The figures with GB/s and the share of the rate of a copy."""
    rate = matrix_bytes(size) / figures["kernel_us"] / 1e3
    return figures | {"gb_s": round(rate), "share": round(rate / copied, 3)}


def sweep(size: str, rows: int, copied: float, commit: str) -> Plan:
    """Times all candidates in one trace and returns the fastest."""
    found = candidates(size)
    programs = compiled({p: (program(by_plan(p), size), shapes(size, rows)) for p in found})
    arrays = first_rows(draw(size), rows)
    want, right = wanted(size, *arrays), {}
    for plan in found:
        try:
            outs, again = (programs[plan](*arrays) for _ in range(2))
            right[plan] = check(outs, again, want, None)
        except Exception as reason:  # report it and measure the others
            print(f"{size} by {plan}: {type(reason).__name__}: {str(reason)[:200]}", flush=True)
    runs = [(lambda plan=plan: programs[plan](*arrays)) for plan in right for _ in range(REPEATS)]
    each = times(traced(runs), len(runs), matrices(size))
    took = {
        plan: rates(size, median(each[i * REPEATS : (i + 1) * REPEATS]), copied)
        for i, plan in enumerate(right)
    }
    for plan, figures in took.items():
        case = {"size": size, "rows": rows, "plan": asdict(plan), "chosen": plan == found[0]}
        record("projection_sweep", commit, case | figures | {"error": round(right[plan], 6)})
    ranked = sorted(took, key=lambda plan: took[plan]["kernel_us"])
    for plan in dict.fromkeys([*ranked[:5], *(p for p in ranked if p == found[0])]):
        mark = " (chosen now)" if plan == found[0] else ""
        print(f"{size}, {rows} rows: {took[plan]} by {plan}{mark}", flush=True)
    return ranked[0]


def measure(size: str, rows: list[int], plan: Plan, copied: float, commit: str) -> None:
    """Records the kernel and XLA for each number of rows."""
    runs = {"mosaic_gpu": by_plan(plan), "xla": xla.projection}
    cells = {
        (name, n): (program(run, size), shapes(size, n)) for name, run in runs.items() for n in rows
    }
    programs = compiled(cells)
    drawn, more_rows = draw(size), None
    for n, name in itertools.product(sorted(rows, reverse=True), runs):
        case, arrays = {"size": size, "rows": n, "implementation": name}, first_rows(drawn, n)
        run = programs[name, n]
        try:
            outs, again = run(*arrays), run(*arrays)
            ours = name == "mosaic_gpu"
            found = check(outs, again, wanted(size, *arrays), more_rows if ours else None)
            more_rows = outs if ours else more_rows
            took = times(
                traced([lambda run=run, arrays=arrays: run(*arrays)] * REPEATS),
                REPEATS,
                matrices(size),
            )
        except Exception as reason:  # report it and measure the others
            text = f"{type(reason).__name__}: {str(reason).strip()[:200]}"
            print(f"{size}, {n} rows, by {name} fails: {text}", flush=True)
            continue
        figures = rates(size, median(took), copied)
        figures |= {"copy_gb_s": round(copied), "error": round(found, 6)}
        record("projection", commit, case | figures | ({"plan": asdict(plan)} if ours else {}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = {name.replace(" ", "_"): name for name in PUBLISHED}
    parser.add_argument(
        "--sizes", nargs="+", choices=names, default=list(names), help="default: all"
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 8, 16], help="rows of x (default: 1 8 16)"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="try tiles, stages and splits, with 8 rows"
    )
    add_commit(parser)
    options = parser.parse_args()
    if not all(1 <= rows <= MOST for rows in options.rows):
        parser.error(f"--rows {options.rows}: 1 to {MOST} each")
    copied = copy_rate()
    print(f"copy: {copied:.0f} GB/s", flush=True)
    for size in (names[name] for name in options.sizes):
        plan = candidates(size)[0]
        if options.sweep:
            plan = sweep(size, 8, copied, options.commit)
        measure(size, options.rows, plan, copied, options.commit)


if __name__ == "__main__":
    main()
