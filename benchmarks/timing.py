"""How kernels are timed: several calls in one program, so that launches do not count, and the
median of twenty programs."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax

REPEATS = 20


def repeated(call: Callable, calls: int) -> Callable:
    """A jitted program of `calls` calls, one after the other. One number of each result goes into
    the next inputs, of the last result
    into those that are left over: no call can be left out, and no work on an input moved out of the
      loop."""

    def again(_, inputs):
        results = jax.tree.leaves(call(*inputs))
        results += results[-1:] * (len(inputs) - len(results))
        return tuple(
            x.at[(0,) * x.ndim].set(y[(0,) * y.ndim].astype(x.dtype))
            for x, y in zip(inputs, results, strict=False)
        )

    return jax.jit(lambda *inputs: jax.lax.fori_loop(0, calls, again, inputs))


def compiled(programs: Mapping[Hashable, tuple[Callable, list]]) -> dict[Hashable, Callable]:
    """Jitted programs, each with the shapes of its inputs, compiled side by side before anything is
    timed. In the place of one that
    does not compile stands a function that raises why: it must not take the others' figures
      along."""

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
    """A call, over `REPEATS` runs of a program of `calls` calls, after two to warm up."""
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
