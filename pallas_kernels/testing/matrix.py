"""Every implementation of attend and of the gated delta rule against the float64 reference, value and gradient, on the same cases; their
token steps too, of which there are values alone.

    python -m pallas_kernels.testing.matrix                     # what this machine runs; kernels for TPUs interpreted on a CPU
    NPROC=64 python -m pallas_kernels.testing.matrix           # those for Hopper too, with JAX 0.11.2: see `mosaic_gpu_interpreter`
    python -m pallas_kernels.testing.matrix --longest 100000    # on a GPU
    python -m pallas_kernels.testing.matrix --operator gated_delta_rule --case 'repeated|packed'

Prints one line a case and implementation: the largest of its errors in shares of what is allowed, or why it does not take the case.
Ends with an error where one is too large. Relative root-mean-square errors; float32 may have 1e-4, bfloat16 what `ALLOWED` says. A result
of which something must be exact and is not has an infinite error.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import cache, partial
from io import StringIO
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attend import decode as attend_decode
from pallas_kernels.attend import implementations as attend_implementations
from pallas_kernels.attend import reference as attend_reference
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_delta_rule import decode as delta_decode
from pallas_kernels.gated_delta_rule import implementations as delta_implementations
from pallas_kernels.gated_delta_rule import reference as delta_reference
from pallas_kernels.testing import mosaic_gpu_interpreter
from pallas_kernels.testing.cases import CASES, RESULTS, Case, Problem
from pallas_kernels.testing.parity import in_float64, poison, rel_rms, with_gradients
from pallas_kernels.testing.steps import implementation_in_a_row, in_a_row

IMPLEMENTATIONS = {
    "attend": attend_implementations.IMPLEMENTATIONS,
    "gated_delta_rule": delta_implementations.IMPLEMENTATIONS,
    "attend_step": tuple(map(implementation_in_a_row, attend_implementations.STEPS)),
    "gated_delta_step": tuple(map(implementation_in_a_row, delta_implementations.STEPS)),
}
REFERENCES = {
    "attend": attend_reference.attend,
    "gated_delta_rule": delta_reference.gated_delta_rule,
    "attend_step": in_a_row(attend_decode.step),
    "gated_delta_step": in_a_row(delta_decode.step),
}
ALLOWED = {name: 5e-3 for results in RESULTS.values() for name in results}
ALLOWED |= {f"d_{name}": 8e-3 for name in ("q", "k", "v", "initial_state")}
ALLOWED |= {"d_g": 2e-2, "d_beta": 2e-2, "race": 1}
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
    chosen = [x for x in IMPLEMENTATIONS[operator] if not names or x.name in names]
    for case in CASES[operator](longest):
        if re.search(pattern, case.name):
            for dtype in (jnp.float32, jnp.bfloat16):
                yield from compare(operator, chosen, case, dtype)


def compare(operator: str, implementations: Sequence[Implementation], case: Case, dtype) -> Iterator[Cell]:
    """A cell for each of an operator's implementations on this machine."""
    problem, want = _in_dtype(case.make(), dtype), None
    for implementation in implementations:
        runs, inside, refusal = _runnable(operator, implementation, jax.devices()[0])
        refusal = refusal or implementation.supports(*problem.inputs.values(), **problem.tokens, **problem.rule)
        if not refusal and want is None:  # the dearest part, of which a case that all refuse has no use
            want = jax.tree.leaves(in_float64(_compiled(REFERENCES[operator], *_signature(problem)))(*_arrays(problem)))
        errors = {} if refusal else _errors(operator, runs, inside, problem, want)
        allowed = {name: ALLOWED[name] if dtype == jnp.bfloat16 else 1e-4 for name in errors}
        yield Cell(implementation.name, case.name, jnp.dtype(dtype).name, errors, allowed, refusal)


def _in_dtype(problem: Problem, dtype) -> Problem:
    return _with_each(problem, lambda name, x: jnp.asarray(x, dtype if x.dtype == np.float64 else x.dtype))


def _errors(operator: str, runs: Callable, inside: Callable, problem: Problem, want: list) -> dict[str, float]:
    """Errors by the name of a result."""
    run, raced = _compiled(runs, *_signature(problem)), {"race": float("inf")}
    try:
        with inside(), redirect_stdout(StringIO()) as said:  # the TPU interpreter only prints that it found a race
            got = jax.tree.leaves(run(*_arrays(_poisoned(problem))))
    except mosaic_gpu_interpreter.Raced:
        return raced
    if "RACE DETECTED" in said.getvalue():
        return raced
    names = [*RESULTS[operator], *(f"d_{name}" for name in problem.inputs if problem.cotangents)]
    return {name: _error(a, b, problem.exact.get(name)) for name, a, b in zip(names, got, want, strict=True)}


def _poisoned(problem: Problem) -> Problem:
    """NaN in what inputs and cotangents hold at pads."""

    def dirty(name, x):
        pads = problem.pads.get(name)
        return x if pads is None else jnp.asarray(poison(np.asarray(x), problem.tokens[pads]))

    return _with_each(problem, dirty)


def _with_each(problem: Problem, change: Callable) -> Problem:
    """The problem with `change(name, array)` in the place of each array of its inputs and cotangents."""

    def changed(arrays):
        return {name: jax.tree.map(partial(change, name), x) for name, x in arrays.items()}

    return problem._replace(inputs=changed(problem.inputs), cotangents=changed(problem.cotangents))


def _error(got, want, exact) -> float:
    """exact: the rows that must be equal bit for bit, or None."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if exact is not None and got[exact].tobytes() != want[exact].tobytes():
        return float("inf")
    seen = np.isfinite(want)  # lse of a query that sees nothing is -inf
    return rel_rms(got[seen], want[seen]) if (np.isneginf(got) == ~seen).all() else float("nan")


@cache
def _runnable(operator: str, implementation: Implementation, device) -> tuple[Callable, Callable[[], AbstractContextManager], str | None]:
    """The function to call here, inside what, and why there is none: on a CPU, kernels are interpreted."""
    reason = implementation.device(device)
    if reason and device.platform == "cpu" and implementation.name == "mosaic_tpu":
        return partial(implementation.run, interpret=INTERPRETED), nullcontext, None
    if reason and device.platform == "cpu" and implementation.name == "mosaic_gpu":
        if operator == "gated_delta_step":
            return implementation.run, nullcontext, "for Hopper GPUs; not interpreted, for its blocks write into each other's memory"
        # a block of the other step writes the slot that another may be reading, which then leaves it out of the window
        inside = partial(mosaic_gpu_interpreter.interpreted, races=operator != "attend_step")
        return implementation.run, inside, mosaic_gpu_interpreter.refusal()
    return implementation.run, nullcontext, reason


def _arrays(problem: Problem) -> tuple[tuple, tuple, dict]:
    return tuple(problem.inputs.values()), tuple(problem.cotangents.values()), problem.tokens


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
