"""Every implementation of attention and of the gated delta rule against the float64 reference,
value and gradient, on the same cases; their token steps too, of which there are values alone.

    python -m pallas_kernels.testing.matrix                     # what this machine runs; kernels
    for TPUs interpreted on a CPU NPROC=64 python -m pallas_kernels.testing.matrix           # those
    for Hopper too, with JAX 0.11.2: see `mosaic_gpu_interpreter` python -m
    pallas_kernels.testing.matrix --longest 100000 --record matrix.jsonl --minutes 9    # on a GPU;
    again, until it says done python -m pallas_kernels.testing.matrix --operator gated_delta_rule
    --case 'repeated|packed' python -m pallas_kernels.testing.matrix --only 'gated_delta_rule
    mosaic_gpu bfloat16 .*alike'

Prints one line a case and implementation: the largest of its errors in shares of what is allowed,
or why it does not take the case. Ends with an error where one is too large. Relative
root-mean-square errors; float32 may have 1e-4, bfloat16 what `ALLOWED` says. A result of which
something must be exact and is not has an infinite error.

Each cell is computed `--repeats` times: 20 on a GPU, once where kernels are interpreted. Between
two times other work runs, which leaves NaN in the memory that the next one gets (see `disturb`).
Each time must be within what is allowed, and all of them equal bit for bit, but for what an
implementation declares to be `unordered`; a cell that is not equal has an infinite error "repeats".

References are computed in float64 on the same device by XLA, for so many rows at once as hold 16
heads. With `--record` a cell that passed there is not computed again (start a new record for
changed code), and the summary is of the whole record.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from functools import cache, partial
from io import StringIO
from os import cpu_count
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import reference as attention_reference
from pallas_kernels.attention import step as attention_step
from pallas_kernels.attention.implementations import ATTENTION, ATTENTION_STEP
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_delta_rule import reference as delta_reference
from pallas_kernels.gated_delta_rule import step as delta_step
from pallas_kernels.gated_delta_rule.implementations import GATED_DELTA_RULE, GATED_DELTA_RULE_STEP
from pallas_kernels.testing import cudnn_attention, disturb, mosaic_gpu_interpreter
from pallas_kernels.testing.cases import CASES, RESULTS, Case, Problem
from pallas_kernels.testing.judge import judge
from pallas_kernels.testing.parity import poison, value_and_gradients
from pallas_kernels.testing.programs import Programs, ahead
from pallas_kernels.testing.record import Record
from pallas_kernels.testing.steps import implementation_in_a_row, in_a_row

IMPLEMENTATIONS = {
    "attention": (*ATTENTION.implementations, cudnn_attention.CUDNN),
    "gated_delta_rule": GATED_DELTA_RULE.implementations,
    "attention_step": tuple(map(implementation_in_a_row, ATTENTION_STEP.implementations)),
    "gated_delta_rule_step": tuple(
        map(implementation_in_a_row, GATED_DELTA_RULE_STEP.implementations)
    ),
}
REFERENCES = {
    "attention": attention_reference.attention,
    "gated_delta_rule": delta_reference.gated_delta_rule,
    "attention_step": in_a_row(attention_step.step),
    "gated_delta_rule_step": in_a_row(delta_step.step),
}
ROWS_ALONE = (
    "attention",
    "gated_delta_rule",
)  # all arrays begin with the axis of rows, which have nothing to do with each other
HEADS_AT_ONCE = 16  # of a reference in float64: what it keeps for gradients grows with them
ALLOWED = {name: 5e-3 for results in RESULTS.values() for name in results}
ALLOWED |= {f"d_{name}": 8e-3 for name in ("q", "k", "v", "initial_state")}
ALLOWED |= {"d_g": 2e-2, "d_beta": 2e-2}
ANY = {"race": 1.0, "repeats": 1.0, "raised": 1.0}  # these are 0 or infinite
INTERPRETED = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    dma_execution_mode="on_wait",
)
PROGRAMS = Programs()


class Cell(NamedTuple):
    """What an implementation made of a case: its errors by name, or why it did not take it.

    differing: by the name of a result, in how many calls it was not that of the first. seconds: of
    all calls, and, in the first cell of a case, of the reference.
    """

    operator: str
    implementation: str
    case: str
    dtype: str
    errors: dict[str, float]
    allowed: dict[str, float]
    refusal: str | None
    repeats: int = 1
    differing: dict[str, int] = {}
    note: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.operator} {self.implementation} {self.dtype} {self.case}"

    @property
    def share(self) -> float:
        """The largest error as a share of what is allowed; NaN stays NaN."""
        shares = [error / self.allowed[name] for name, error in self.errors.items()]
        return float(np.max(shares)) if shares else 0.0

    @property
    def passed(self) -> bool:
        return bool(self.refusal) or self.share <= 1

    def __str__(self) -> str:
        found = f"no: {self.refusal}" if self.refusal else f"{self.share:5.2f} of what is allowed"
        shares = {
            n: np.nan_to_num(error / self.allowed[n], nan=np.inf)
            for n, error in self.errors.items()
        }
        worst = max(shares, key=shares.get) if shares else ""
        differing = ", ".join(f"{name} differs in {n}" for name, n in self.differing.items())
        differing = f" ({differing} of {self.repeats} calls)" if differing else ""
        return (
            f"{self.implementation:11} {self.dtype:9} {self.case:48} {found}"
            f" {worst}{differing}{self.note and ': '}{self.note}"
        )


class Group(NamedTuple):
    """The cells that share a problem."""

    operator: str
    case: Case
    dtype: str
    implementations: tuple[Implementation, ...]


def groups(
    operator: str, longest: int, wanted: Callable[[Implementation, str, str], bool]
) -> Iterator[Group]:
    """All cells of an operator's matrix, of which `wanted(implementation, dtype, name of the
    case)` says that they are to run."""
    for case in CASES[operator](longest):
        for dtype in case.dtypes:
            if chosen := tuple(i for i in IMPLEMENTATIONS[operator] if wanted(i, dtype, case.name)):
                yield Group(operator, case, dtype, chosen)


def compare(group: Group, problem: Problem, repeats: int) -> Iterator[Cell]:
    """A cell for each of the group's implementations on this machine."""
    want = None
    for implementation in group.implementations:
        runs, inside, refusal = _runnable(group.operator, implementation, jax.devices()[0])
        refusal = refusal or implementation.supports(
            *problem.inputs.values(), **problem.tokens, **problem.rule
        )
        errors, differing, note, start = {}, {}, "", time.monotonic()
        if not refusal:
            try:
                if want is None:  # the dearest part, of which a case that all refuse has no use
                    want = _reference(group.operator, problem)
                errors, counts = _errors(group.operator, runs, inside, problem, want, repeats)
                differing = {name: n for name, n in counts.items() if n}
                if differing.keys() - set(implementation.unordered):
                    errors["repeats"] = float("inf")
            except Exception as error:  # a cell of its own, for a run of hours must not end with it
                errors, note = (
                    {"raised": float("inf")},
                    f"{type(error).__name__}: {error}".splitlines()[0],
                )
        allowed = {
            name: ANY.get(name) or (ALLOWED[name] if group.dtype == "bfloat16" else 1e-4)
            for name in errors
        }
        cell = Cell(
            group.operator,
            implementation.name,
            group.case.name,
            group.dtype,
            errors,
            allowed,
            refusal,
        )
        yield cell._replace(
            repeats=repeats, differing=differing, note=note, seconds=time.monotonic() - start
        )


def prepare(group: Group, compiled: bool) -> Problem:
    """The group's problem as numpy arrays; its programs, if they are to be `compiled` ahead."""
    problem = _with_each(
        group.case.make(),
        lambda name, x: np.asarray(x, group.dtype if x.dtype == np.float64 else x.dtype),
    )
    if compiled:
        with suppress(Exception):  # which the cell raises again
            _compile_ahead(group, problem)
    return problem


def _compile_ahead(group: Group, problem: Problem) -> None:
    device, used = jax.devices()[0], False
    for implementation in group.implementations:
        runs, _, refusal = _runnable(group.operator, implementation, device)
        if refusal or implementation.supports(
            *problem.inputs.values(), **problem.tokens, **problem.rule
        ):
            continue
        program, used = PROGRAMS(_function(runs, *_signature(problem)), *_arrays(problem)), True
        PROGRAMS(disturb.work(disturb.sizes(program), device))
        results = jax.tree.leaves(program.out_info)
        PROGRAMS(
            judge,
            results,
            results,
            [jax.ShapeDtypeStruct(x.shape, np.float64) for x in results],
            _exact(group.operator, problem),
        )
    if used:
        for part in _parts(group.operator, problem):
            PROGRAMS(
                _function(REFERENCES[group.operator], *_signature(part)),
                *jax.tree.map(_wide, _arrays(part)),
            )


def _reference(operator: str, problem: Problem) -> list[jax.Array]:
    """Results and gradients in float64, on the device."""
    found = []
    for part in _parts(operator, problem):
        arrays = _arrays(part)
        program = PROGRAMS(
            _function(REFERENCES[operator], *_signature(part)), *jax.tree.map(_wide, arrays)
        )
        with jax.enable_x64(True):  # widened on the device
            found.append(
                jax.tree.leaves(
                    program(*jax.tree.map(lambda x: jnp.asarray(x).astype(_wide(x).dtype), arrays))
                )
            )
    with jax.enable_x64(True):
        return (
            found[0] if len(found) == 1 else [jnp.concatenate(x) for x in zip(*found, strict=True)]
        )


def _wide(x) -> jax.ShapeDtypeStruct:
    """The shape of an array with every floating dtype as float64."""
    return jax.ShapeDtypeStruct(
        x.shape, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype
    )


def _parts(operator: str, problem: Problem) -> list[Problem]:
    """The problem by so many of its rows at a time as a reference has memory for."""
    if operator not in ROWS_ALONE:
        return [problem]
    batch, _, heads, _ = problem.inputs["q"].shape
    rows = max(1, HEADS_AT_ONCE // heads)

    def cut(start):
        part = _with_each(problem, lambda _, x: x[start : start + rows])
        return part._replace(tokens=jax.tree.map(lambda x: x[start : start + rows], problem.tokens))

    return [cut(start) for start in range(0, batch, rows)]


def _errors(
    operator: str, runs: Callable, inside: Callable, problem: Problem, want: list, repeats: int
) -> tuple[dict, dict]:
    """By the name of a result, the worst of its errors in so many calls, and how many of these
    differ from the first."""
    raced, exact = {"race": float("inf")}, _exact(operator, problem)
    try:
        with (
            inside(),
            redirect_stdout(StringIO()) as said,
        ):  # the TPU interpreter only prints that it found a race
            arrays = jax.tree.map(jnp.asarray, _arrays(_poisoned(problem)))
            program = PROGRAMS(_function(runs, *_signature(problem)), *arrays)
            first, verdicts = jax.block_until_ready(jax.tree.leaves(program(*arrays))), []
            for repeat in range(repeats):
                again = first
                if repeat:
                    disturbance = disturb.work(disturb.sizes(program), jax.devices()[0])
                    PROGRAMS(disturbance)()
                    again = jax.tree.leaves(program(*arrays))
                judged = PROGRAMS(judge, first, again, want, exact)
                with jax.enable_x64(True):
                    verdicts.append(judged(first, again, want, exact))
                del again
    except mosaic_gpu_interpreter.Raced:
        return raced, {}
    if "RACE DETECTED" in said.getvalue():
        return raced, {}
    errors, differs = (np.asarray(jax.device_get(x)) for x in zip(*verdicts, strict=True))
    names = _names(operator, problem)
    return dict(zip(names, errors.max(0).tolist(), strict=True)), dict(
        zip(names, differs.sum(0).tolist(), strict=True)
    )


def _names(operator: str, problem: Problem) -> list[str]:
    """Of all results and gradients, in order."""
    return [*RESULTS[operator], *(f"d_{name}" for name in problem.inputs if problem.cotangents)]


def _exact(operator: str, problem: Problem) -> list[np.ndarray | None]:
    """For each result, which of its rows must be equal bit for bit, or None."""
    found = (problem.exact.get(name) for name in _names(operator, problem))
    return [x if x is None else np.asarray(x) for x in found]


def _poisoned(problem: Problem) -> Problem:
    """NaN in what inputs and cotangents hold at pads."""

    def dirty(name, x):
        pads = problem.pads.get(name)
        return x if pads is None else poison(x, problem.tokens[pads])

    return _with_each(problem, dirty)


def _with_each(problem: Problem, change: Callable) -> Problem:
    """The problem with `change(name, array)` in the place of each array of its inputs and
    cotangents."""

    def changed(arrays):
        return {name: jax.tree.map(partial(change, name), x) for name, x in arrays.items()}

    return problem._replace(inputs=changed(problem.inputs), cotangents=changed(problem.cotangents))


@cache
def _runnable(
    operator: str, implementation: Implementation, device
) -> tuple[Callable, Callable[[], AbstractContextManager], str | None]:
    """The function to call here, inside what, and why there is none: on a CPU, kernels are
    interpreted."""
    reason = implementation.device(device)
    if reason and device.platform == "cpu" and implementation.name == "mosaic_tpu":
        return partial(implementation.run, interpret=INTERPRETED), nullcontext, None
    if reason and device.platform == "cpu" and implementation.name == "mosaic_gpu":
        if operator == "gated_delta_rule_step":
            return (
                implementation.run,
                nullcontext,
                "for Hopper GPUs; not interpreted, for its blocks write into each other's memory",
            )
        # a block of the other step writes the slot that another may be reading, which then leaves
        # it out of the window
        inside = partial(mosaic_gpu_interpreter.interpreted, races=operator != "attention_step")
        return implementation.run, inside, mosaic_gpu_interpreter.refusal()
    return implementation.run, nullcontext, reason


def _arrays(problem: Problem) -> tuple[tuple, tuple, dict]:
    return tuple(problem.inputs.values()), tuple(problem.cotangents.values()), problem.tokens


def _signature(problem: Problem) -> tuple[tuple, tuple]:
    return tuple(problem.inputs), tuple(problem.rule.items())


@cache  # cases of the same shapes share what was compiled
def _function(function: Callable, names: tuple[str, ...], rule: tuple) -> Callable:
    def by_position(*inputs, **tokens):
        return function(**dict(zip(names, inputs, strict=True)), **tokens, **dict(rule))

    return value_and_gradients(by_position)


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
