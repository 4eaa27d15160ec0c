"""Compiles programs ahead of their use, several at a time. On a GPU most of the parity matrix's
time would be compilation."""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TypeVar

import jax
import numpy as np

from pallas_kernels.testing.parity import compiler_options

Item = TypeVar("Item")
Result = TypeVar("Result")


class Programs:
    """Compiles `function(*args)` for the shapes and dtypes of `args` once, whichever thread asks
    first.

    The key of a program is the function itself: pass the same object for the same computation.
    """

    def __init__(self):
        self._lock = Lock()
        self._found: dict[Hashable, Future] = {}

    def __call__(self, function: Callable, *args) -> Callable:
        """The compiled program. args: arrays or their shapes, in trees; with float64 among them it
        is compiled, and is to be called, under `jax.enable_x64(True)`.

        Raises what the compilation raised, for each that asks.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        leaves, tree = jax.tree.flatten(shapes)
        key = function, tree, tuple((x.shape, x.dtype) for x in leaves)
        with self._lock:
            mine = key not in self._found
            future = self._found.setdefault(key, Future())
        if mine:
            try:
                with jax.enable_x64(any(x.dtype == np.float64 for x in leaves)):
                    future.set_result(jax.jit(function).lower(*shapes).compile(compiler_options()))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def ahead(
    items: Iterable[Item], prepare: Callable[[Item], Result], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Each item with the result of `prepare`, in order. Items are prepared by `workers` threads, as
    many ahead. With 0 workers an item is prepared when it is asked for, in the caller's thread."""
    if not workers:
        yield from ((item, prepare(item)) for item in items)
        return
    waiting: deque[tuple[Item, Future]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append((item, pool.submit(prepare, item)))
            if len(waiting) > workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
