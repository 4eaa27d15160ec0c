"""Requests of mixed lengths through an engine: tokens a second, and how long any of them waits."""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.inference.sizes import Bench
from benchmarks.inference.stream import percentiles
from benchmarks.timing import summary
from infinitevl_jax.serve.engine import Engine
from infinitevl_jax.serve.requests import Request


class Times(NamedTuple):
    """Of requests that ran together, in milliseconds.

    Attributes:
      first: from submission to the first token, of each. gaps: the longest wait between two
        arrivals of tokens, of each. total: until all were done.
    """

    first: list[float]
    gaps: list[float]
    total: float


def batch(bench: Bench) -> Iterator[dict]:
    """One line for one request after another, one for many at once, and one for the wait while a
    long prompt is read."""
    size = bench.size
    prompts = mixed_prompts(size.requests, size.lengths)
    single = new_engine(bench, 1)
    warm_up(single, prompts)
    bench.compilations.warm()
    some = [prompts[i] for i in (0, len(prompts) // 2, -1)]  # short, middling and long
    alone = [follow(single, submit(single, [prompt], size.new)) for prompt in some]
    one = rate(alone, size.new)
    yield requests_line(bench, 1, some, alone, one) | bench.compilations.since()
    del single

    engine = new_engine(bench, size.requests)
    warm_up(engine, prompts)
    bench.compilations.warm()
    order = np.random.default_rng(1).permutation(len(prompts))
    together = follow(engine, submit(engine, [prompts[i] for i in order], size.new))
    many = rate([together], size.new)
    yield (
        requests_line(bench, size.requests, prompts, [together], many)
        | {"times_one": round(many / one, 2)}
        | bench.compilations.since()
    )
    yield long_prompt(bench, engine, prompts)


def new_engine(bench: Bench, slots: int) -> Engine:
    return Engine(bench.model, slots=slots, chunk=bench.size.chunk, steps=bench.size.steps)


def mixed_prompts(count: int, lengths: tuple[int, int]) -> list[np.ndarray]:
    """Random prompts [1, length], from the shortest to the longest in equal ratios."""
    rng = np.random.default_rng(0)
    sizes = np.geomspace(*lengths, count).round().astype(int)
    return [rng.integers(0, 150_000, (1, n)) for n in sizes]


def submit(engine: Engine, prompts: Sequence[np.ndarray], new: int) -> list[Request]:
    return [engine.submit(p, max_new_tokens=new, eos_token_ids=[]) for p in prompts]


def warm_up(engine: Engine, prompts: Sequence[np.ndarray]) -> None:
    """Compile: requests that end by themselves, and one that is cancelled."""
    ended = submit(engine, prompts[:2], engine.steps + 2)
    engine.run()
    assert all(request.done for request in ended)
    (cancelled,) = submit(engine, prompts[:1], engine.steps * 8)
    while not cancelled.tokens:
        engine.step()
    cancelled.cancel()
    engine.run()


def follow(engine: Engine, requests: Sequence[Request]) -> Times:
    """Work until all requests are done, and note when their tokens come."""
    started = time.perf_counter()
    seen, last = [0] * len(requests), [started] * len(requests)
    first, gaps = [0.0] * len(requests), [0.0] * len(requests)
    while not all(request.done for request in requests):
        engine.step()
        now = time.perf_counter()
        for i, request in enumerate(requests):
            if len(request.tokens) > seen[i]:
                if seen[i]:
                    gaps[i] = max(gaps[i], (now - last[i]) * 1e3)
                else:
                    first[i] = (now - started) * 1e3
                seen[i], last[i] = len(request.tokens), now
    total = (time.perf_counter() - started) * 1e3
    engine.run()
    return Times(first, gaps, total)


def rate(runs: Sequence[Times], new: int) -> float:
    """New tokens a second, prompts included in the time."""
    return sum(len(run.first) for run in runs) * new / sum(run.total for run in runs) * 1e3


def requests_line(bench: Bench, count: int, prompts, runs: Sequence[Times], tokens: float) -> dict:
    first = [ms for run in runs for ms in run.first]
    gaps = [ms for run in runs for ms in run.gaps]
    return {
        "requests": count,
        "prompts": [int(min(p.size for p in prompts)), int(max(p.size for p in prompts))],
        "prompt_tokens": int(sum(p.size for p in prompts)),
        "new_tokens": bench.size.new,
        "chunk": bench.size.chunk,
        "steps": bench.size.steps,
        "tokens_per_s": round(tokens, 1),
        "first_token_ms": summary(first, 2) | percentiles(first),
        "longest_gap_ms": round(max(gaps), 2),
        "finished": len(first),
    }


def long_prompt(bench: Bench, engine: Engine, prompts: Sequence[np.ndarray]) -> dict:
    """The waits of requests that decode, before a long prompt comes and while it is read.

    All slots but one decode. A round is a chunk of the prompt and a launch for the others: what
    the prompt costs a request is the longest round less the usual one without it.
    """
    size = bench.size
    others = submit(engine, prompts[: engine.slots - 1], 1 << 20)
    while not all(request.tokens for request in others):
        engine.step()
    for _ in range(2):
        engine.step()
    bench.compilations.warm()
    quiet = [_round(engine) for _ in range(size.repeats)]
    rng, chunks = np.random.default_rng(2), engine.chunks
    ids = rng.integers(0, 150_000, (1, size.long))
    started, reading = time.perf_counter(), []
    (long,) = submit(engine, [ids], 1)
    before = [len(request.tokens) for request in others]
    while not long.done:
        reading.append(_round(engine))
    first = (time.perf_counter() - started) * 1e3
    grown = [len(request.tokens) - n for request, n in zip(others, before, strict=True)]
    # a launch's tokens come with the next round
    assert min(grown) >= (len(reading) - 1) * engine.steps, "a request waited for more than a round"
    compilations = bench.compilations.since()
    for request in others:
        request.cancel()
    engine.run()
    usual = statistics.median(quiet)
    return {
        "requests": len(others),
        "prompt": size.long,
        "chunk": size.chunk,
        "steps": size.steps,
        "chunks": engine.chunks - chunks,
        "rounds": len(reading),
        "round_ms_without": summary(quiet, 3),
        "round_ms": summary(reading, 3),
        "longest_wait_ms": round(max(reading), 3),
        "chunk_ms": round(statistics.median(reading) - usual, 3),
        # 1: no request waited longer than one chunk takes
        "longest_wait_in_chunks": round(
            (max(reading) - usual) / max(statistics.median(reading) - usual, 1e-6), 2
        ),
        "first_token_ms": round(first, 2),
        **compilations,
    }


def _round(engine: Engine) -> float:
    started = time.perf_counter()
    engine.step()
    return (time.perf_counter() - started) * 1e3
