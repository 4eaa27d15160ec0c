"""Computes the cells of the parity matrix: implementations against the float64 reference."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from functools import cache, partial
from io import StringIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention import reference as attention_reference
from pallas_kernels.attention import step as attention_step
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_delta_rule import reference as delta_reference
from pallas_kernels.gated_delta_rule import step as delta_step
from pallas_kernels.projection import reference as projection_reference
from pallas_kernels.short_conv import reference as short_conv_reference
from pallas_kernels.testing import disturb, mosaic_gpu_interpreter
from pallas_kernels.testing.cases import RESULTS, Problem
from pallas_kernels.testing.cells import ALLOWED, Cell, Group
from pallas_kernels.testing.judge import judge
from pallas_kernels.testing.parity import poison, value_and_gradients
from pallas_kernels.testing.programs import Programs
from pallas_kernels.testing.steps import in_a_row

REFERENCES = {
    "attention": attention_reference.attention,
    "gated_delta_rule": delta_reference.gated_delta_rule,
    "attention_step": in_a_row(attention_step.step),
    "gated_delta_rule_step": in_a_row(delta_step.step),
    "projection": projection_reference.projection,
    "short_conv": short_conv_reference.short_conv,
}
# Operators whose arrays all begin with the batch axis, with rows independent of each other.
ROWS_ALONE = "attention", "gated_delta_rule"
HEADS_AT_ONCE = 16  # of a float64 reference: what it keeps for gradients grows with them
ANY = {"race": 1.0, "repeats": 1.0, "raised": 1.0}  # these are 0 or infinite
INTERPRETED = pltpu.InterpretParams(
    detect_races=True,
    uninitialized_memory="nan",
    out_of_bounds_reads="raise",
    dma_execution_mode="on_wait",
)
PROGRAMS = Programs()


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
                if want is None:  # the slowest part: skipped where all implementations refuse
                    want = _reference(group.operator, problem)
                errors, counts = _errors(group.operator, runs, inside, problem, want, repeats)
                differing = {name: n for name, n in counts.items() if n}
                if differing.keys() - set(implementation.unordered):
                    errors["repeats"] = float("inf")
            except Exception as error:  # a failed cell, so that a run of hours goes on
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
    """The group's problem as numpy arrays. compiled: compile its programs now."""
    problem = _with_each(
        group.case.make(),
        lambda name, x: np.asarray(x, group.dtype if x.dtype == np.float64 else x.dtype),
    )
    if compiled:
        with suppress(Exception):  # the cell raises it again
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
    """The problem in parts of so many rows as a reference has memory for."""
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
    """By name of a result: its largest error over all calls, and the number of calls that differ
    from the first."""
    raced, exact = {"race": float("inf")}, _exact(operator, problem)
    try:
        # The TPU interpreter only prints that it found a race.
        with inside(), redirect_stdout(StringIO()) as said:
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
    """The names of all results and gradients, in order."""
    return [*RESULTS[operator], *(f"d_{name}" for name in problem.inputs if problem.cotangents)]


def _exact(operator: str, problem: Problem) -> list[np.ndarray | None]:
    """For each result the rows that must be equal bit for bit, or None."""
    found = (problem.exact.get(name) for name in _names(operator, problem))
    return [x if x is None else np.asarray(x) for x in found]


def _poisoned(problem: Problem) -> Problem:
    """The problem with NaN at the pads of inputs and cotangents."""

    def dirty(name, x):
        pads = problem.pads.get(name)
        return x if pads is None else poison(x, problem.tokens[pads])

    return _with_each(problem, dirty)


def _with_each(problem: Problem, change: Callable) -> Problem:
    """The problem with each array of inputs and cotangents replaced by `change(name, array)`."""

    def changed(arrays):
        return {name: jax.tree.map(partial(change, name), x) for name, x in arrays.items()}

    return problem._replace(inputs=changed(problem.inputs), cotangents=changed(problem.cotangents))


@cache
def _runnable(
    operator: str, implementation: Implementation, device
) -> tuple[Callable, Callable[[], AbstractContextManager], str | None]:
    """The function to call, the context to call it in, and the reason it cannot run here. On a CPU
    kernels are interpreted."""
    reason = implementation.device(device)
    if reason and device.platform == "cpu" and implementation.name == "mosaic_tpu":
        return partial(implementation.run, interpret=INTERPRETED), nullcontext, None
    if reason and device.platform == "cpu" and implementation.name == "mosaic_gpu":
        # In attention's step a block may write the slot that another block reads. That one then
        # masks it, so the race is allowed.
        inside = partial(mosaic_gpu_interpreter.interpreted, races=operator != "attention_step")
        return implementation.run, inside, mosaic_gpu_interpreter.refusal()
    return implementation.run, nullcontext, reason


def _arrays(problem: Problem) -> tuple[tuple, tuple, dict]:
    return tuple(problem.inputs.values()), tuple(problem.cotangents.values()), problem.tokens


def _signature(problem: Problem) -> tuple[tuple, tuple]:
    return tuple(problem.inputs), tuple(problem.rule.items())


@cache  # cases of the same shapes share compiled programs
def _function(function: Callable, names: tuple[str, ...], rule: tuple) -> Callable:
    def by_position(*inputs, **tokens):
        return function(**dict(zip(names, inputs, strict=True)), **tokens, **dict(rule))

    return value_and_gradients(by_position)
