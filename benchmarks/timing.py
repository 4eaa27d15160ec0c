"""Timing of kernels: several calls in one program, so that launches do not count.

A figure is the median of twenty programs.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax

REPEATS = 20


def repeated(call: Callable, calls: int) -> Callable:
    """A jitted program of `calls` consecutive calls.

    One number of each result is written into the next inputs (of the last result, into the
    remaining inputs). So the compiler can neither drop a call nor move work out of the loop.
    """

    def again(_, inputs):
        results = jax.tree.leaves(call(*inputs))
        results += results[-1:] * (len(inputs) - len(results))
        return tuple(
            x.at[(0,) * x.ndim].set(y[(0,) * y.ndim].astype(x.dtype))
            for x, y in zip(inputs, results, strict=False)
        )

    return jax.jit(lambda *inputs: jax.lax.fori_loop(0, calls, again, inputs))


def compiled(programs: Mapping[Hashable, tuple[Callable, list]]) -> dict[Hashable, Callable]:
    """Compile programs in parallel, before anything is timed.

    programs: a jitted function and the shapes of its inputs, by key. If one does not compile, its
      function raises the error when it is called, so that the others can still be measured.
    """

    def build(program):
        run, shapes = program
        try:
            return run.lower(*shapes).compile()
        except Exception as error:
            return partial(_fail, error)

    with ThreadPoolExecutor() as pool:
        return dict(zip(programs, pool.map(build, programs.values()), strict=True))


def _fail(error: Exception, *_):
    raise error


def milliseconds(run: Callable, inputs: list[jax.Array], calls: int) -> list[float]:
    """Milliseconds per call: one number for each of `REPEATS` runs of a program of `calls` calls.

    Two runs before them are warm-up.
    """
    for _ in range(2):
        jax.block_until_ready(run(*inputs))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        times.append((time.perf_counter() - start) / calls * 1e3)
    return times


def summary(times: list[float], digits: int = 4) -> dict[str, float]:
    return {
        name: round(of(times), digits)
        for name, of in (("median", statistics.median), ("min", min), ("max", max))
    }
