"""Every implementation of every operator against the float64 reference, value and gradient, on the same cases.

    python -m pallas_kernels.testing.matrix                     # what this machine runs; kernels for TPUs interpreted on a CPU
    python -m pallas_kernels.testing.matrix --longest 100000    # on a GPU
    python -m pallas_kernels.testing.matrix --operator gated_delta_rule --case 'repeated|packed'

Prints one line a case and implementation: the largest of its errors in shares of what is allowed, or why it does not take the case.
Ends with an error where one is too large. Relative root-mean-square errors; float32 may have 1e-4, bfloat16 what `ALLOWED` says.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache, partial
from io import StringIO
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attend import reference as attend_reference
from pallas_kernels.attend.implementations import IMPLEMENTATIONS as ATTEND
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_delta_rule import reference as delta_reference
from pallas_kernels.gated_delta_rule.implementations import IMPLEMENTATIONS as GATED_DELTA_RULE
from pallas_kernels.testing.cases import CASES, RESULTS, Case, Problem
from pallas_kernels.testing.parity import in_float64, poison, rel_rms, with_gradients

IMPLEMENTATIONS = {"attend": ATTEND, "gated_delta_rule": GATED_DELTA_RULE}
REFERENCES = {"attend": attend_reference.attend, "gated_delta_rule": delta_reference.gated_delta_rule}
ALLOWED = {name: 5e-3 for name in ("out", "lse", "state")} | {f"d_{name}": 8e-3 for name in ("q", "k", "v", "initial_state")}
ALLOWED |= {"d_g": 2e-2, "d_beta": 2e-2}
INTERPRETED = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise", dma_execution_mode="on_wait"
)


class Cell(NamedTuple):
    """What an implementation made of a case: its errors by name, or why it did not take it."""

    implementation: str
    case: str
    dtype: str
    errors: dict[str, float]
    allowed: dict[str, float]
    refusal: str | None

    @property
    def share(self) -> float:
        """The largest error as a share of what is allowed; NaN stays NaN."""
        shares = [error / self.allowed[name] for name, error in self.errors.items()]
        return float(np.max(shares)) if shares else 0.0

    def __str__(self) -> str:
        found = f"no: {self.refusal}" if self.refusal else f"{self.share:5.2f} of what is allowed"
        worst = max(self.errors, key=lambda n: self.errors[n] / self.allowed[n]) if self.errors else ""
        return f"{self.implementation:11} {self.dtype:9} {self.case:48} {found} {worst}"


def cells(operator: str, longest: int, names: list[str] | None = None, pattern: str = "") -> Iterator[Cell]:
    """All cells of an operator's matrix on this machine, case by case; of those cases alone whose names match a pattern."""
    device = jax.devices()[0]
    for case in CASES[operator](longest):
        if not re.search(pattern, case.name):
            continue
        problem = case.make()
        for dtype in (jnp.float32, jnp.bfloat16):
            rounded = {n: x if n in problem.exact else np.asarray(jnp.asarray(x, dtype), np.float64) for n, x in problem.inputs.items()}
            rounded = {n: np.asarray(np.float32(x), np.float64) for n, x in rounded.items()}
            cotangents = [np.asarray(jnp.asarray(x, d), np.float64) for x, d in zip(problem.cotangents, (dtype, jnp.float32), strict=True)]
            problem_here = problem._replace(inputs=rounded, cotangents=tuple(cotangents))
            exact = in_float64(_compiled(REFERENCES[operator], *_signature(problem)))
            want = exact(tuple(rounded.values()), tuple(cotangents), problem.tokens)
            for implementation in IMPLEMENTATIONS[operator]:
                if not names or implementation.name in names:
                    yield _cell(operator, implementation, case, problem_here, dtype, want, device)


def _cell(operator, implementation, case: Case, problem: Problem, dtype, want, device) -> Cell:
    results = RESULTS[operator] + tuple(f"d_{name}" for name in problem.inputs)
    cell = partial(Cell, implementation.name, case.name, jnp.dtype(dtype).name)
    inputs = {n: jnp.asarray(x, jnp.float32 if n in problem.exact else dtype) for n, x in problem.inputs.items()}
    runs, reason = _runnable(implementation, device)
    reason = reason or implementation.supports(*inputs.values(), **problem.tokens, **problem.rule)
    if reason:
        return cell({}, {}, reason)
    for name, index in problem.pads.items():
        inputs[name] = jnp.asarray(poison(np.asarray(inputs[name]), problem.tokens[index]))
    with redirect_stdout(StringIO()) as said:  # the TPU interpreter only prints that it found a race
        got = jax.block_until_ready(_compiled(runs, *_signature(problem))(tuple(inputs.values()), problem.cotangents, problem.tokens))
    if "RACE DETECTED" in said.getvalue():
        return cell({"race": float("inf")}, {"race": 1.0}, None)
    errors = {}
    for name, a, b in zip(results, (*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        seen = np.isfinite(b)  # lse of a query that sees nothing is -inf
        errors[name] = rel_rms(a[seen], b[seen]) if (np.isneginf(a) == ~seen).all() else float("nan")
    allowed = {name: ALLOWED[name] if dtype == jnp.bfloat16 else 1e-4 for name in results}
    return cell(errors, allowed, None)


@cache
def _runnable(implementation: Implementation, device) -> tuple[Callable, str | None]:
    """The function to call here, and why there is none: on a CPU, kernels for TPUs are interpreted."""
    reason = implementation.device(device)
    if reason and device.platform == "cpu" and implementation.name == "mosaic_tpu":
        return partial(implementation.run, interpret=INTERPRETED), None
    return implementation.run, reason


def _signature(problem: Problem) -> tuple[tuple, tuple]:
    return tuple(problem.inputs), tuple(problem.rule.items())


@cache  # cases of the same shapes share what was compiled
def _compiled(function: Callable, names: tuple[str, ...], rule: tuple) -> Callable:
    def by_position(*inputs, **tokens):
        return function(**dict(zip(names, inputs, strict=True)), **tokens, **dict(rule))

    return with_gradients(by_position)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operator", choices=CASES, action="append", help="default: all")
    names = sorted({i.name for table in IMPLEMENTATIONS.values() for i in table})
    parser.add_argument("--implementation", action="append", choices=names, help="only this one (several allowed)")
    parser.add_argument("--case", default="", help="only cases whose names match this regular expression")
    parser.add_argument("--longest", type=int, default=1000, help="leave out longer cases")
    args = parser.parse_args()
    bad, ran = [], 0
    for operator in args.operator or CASES:
        print(f"{operator} on {jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
        for cell in cells(operator, args.longest, args.implementation, args.case):
            print(f"  {cell}", flush=True)
            ran += not cell.refusal
            if not cell.refusal and not cell.share <= 1:
                bad.append(cell)
    if not ran:
        sys.exit("nothing ran: no case of that name, or each was refused")
    if bad:
        sys.exit(f"{len(bad)} too far from the reference:\n" + "\n".join(map(str, bad)))


if __name__ == "__main__":
    main()
