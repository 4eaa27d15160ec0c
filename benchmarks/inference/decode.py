"""Decoding through an engine, against the length of the context and the batch."""

import time
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from benchmarks.inference.card import decode_bytes
from benchmarks.inference.sizes import Bench
from benchmarks.timing import summary
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.nn.params import cache_spec
from infinitevl_jax.serve.engine import Engine

ENDLESS = {"max_new_tokens": 1 << 20, "eos_token_ids": []}


def decode(bench: Bench) -> Iterator[dict]:
    """One line for each context with a batch of one, and one for each other batch with a full
    window."""
    size, window = bench.size, bench.model.config.text.sliding_window
    caches: dict[int, Cache] = {}
    for batch in size.batches:
        contexts = size.contexts if batch == 1 else (window,)
        yield from _of_batch(bench, batch, contexts, caches)


def _of_batch(
    bench: Bench, batch: int, contexts: Sequence[int], caches: dict[int, Cache]
) -> Iterator[dict]:
    """Lines of one engine. Caches of new contexts are added to `caches`."""
    config, dtype, rng = bench.model.config, bench.model.dtype, np.random.default_rng(0)
    window, engine = config.text.sliding_window, bench.engine(batch)
    for context in contexts:
        if context not in caches:
            caches[context] = context_cache(engine, context, window, rng, bench.read_all)
        # it ends by itself: now every program of the engine is compiled
        kept = engine.submit(
            [[1]], cache=caches[context], max_new_tokens=2, eos_token_ids=[], keep_cache=True
        )
        kept.result()
        assert kept.cache is not None and int(kept.cache.length[0]) == context + 2
        ms = step_times(engine, caches[context], batch, bench)
        compilations = bench.compilations.since()
        moved = decode_bytes(config, batch, context, dtype)
        yield {
            "batch": batch,
            "context": context,
            "context_by": "reading" if bench.read_all or context <= window else "counters",
            "steps": engine.steps,
            "ms": ms,
            "tokens_per_s": round(batch / ms["median"] * 1e3, 1),
            **bench.card.beside(ms["median"], sum(moved.values())),
            "cache_bytes": kept.cache.nbytes,
            "cache_bytes_by_formula": cache_spec(config, 1, None, dtype).nbytes,
            **compilations,
        }


def context_cache(engine: Engine, context: int, window: int, rng, read_all: bool) -> Cache:
    """The cache of a sequence with `context` random tokens.

    Unless `read_all`, or within the window, the last `window` tokens and what is over whole
    windows are read; then the counters of tokens and positions are set to `context`. The window
    and the states are as full as they would be, and no work depends on their values: the time of a
    step is that of a sequence that was read. The text that follows is not.
    """
    count = context if read_all or context <= window else window + context % window
    request = engine.submit(
        rng.integers(0, 150_000, (1, count)), max_new_tokens=1, eos_token_ids=[], keep_cache=True
    )
    request.result()
    cache = request.cache
    assert cache is not None and int(cache.length[0]) == count
    # slots of the window's ring follow from the count: it may change by whole windows alone
    assert (context - count) % window == 0
    counter = jnp.full_like(cache.length, context)
    return cache._replace(length=counter, next_position=counter)


def step_times(engine: Engine, cache: Cache, batch: int, bench: Bench) -> dict[str, float]:
    """Milliseconds of a step in which each of `batch` sequences gets a token.

    They all go on from `cache`, each with another token. A launch of `steps` steps is timed while
    the next one is under way, as an engine works.
    """
    requests = [engine.submit([[100 + i]], cache=cache, **ENDLESS) for i in range(batch)]
    while not all(request.tokens for request in requests):
        engine.step()
    for _ in range(2):
        engine.step()
    bench.compilations.warm()
    times, before = [], len(requests[0].tokens)
    for _ in range(bench.size.repeats):
        started = time.perf_counter()
        engine.step()
        times.append((time.perf_counter() - started) / engine.steps * 1e3)
    made = len(requests[0].tokens) - before
    assert made == bench.size.repeats * engine.steps, f"{made} tokens came in the timed launches"
    for request in requests:
        request.cancel()
    engine.run()
    return summary(times)
