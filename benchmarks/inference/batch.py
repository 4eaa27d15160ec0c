"""Requests of mixed lengths through an engine: tokens a second, and how long any of them waits."""

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.inference.card import decode_bytes, read_flops
from benchmarks.inference.sizes import Bench
from benchmarks.inference.stream import percentiles
from benchmarks.timing import summary
from infinitevl_jax.inputs.model_inputs import build_inputs
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
    prompts = mixed_prompts(bench.size.requests, bench.size.lengths)
    one = alone(bench, prompts)
    yield one
    engine = bench.engine(bench.size.requests)
    yield together(bench, engine, prompts, one["tokens_per_s"])
    yield long_prompt(bench, engine, prompts)


def alone(bench: Bench, prompts: Sequence[np.ndarray]) -> dict:
    """The shortest, the middle and the longest prompt, one after another, in an engine of one
    slot."""
    engine, new = bench.engine(1), bench.size.new
    warm_up(engine, prompts)
    bench.compilations.warm()
    chosen = [[prompts[i]] for i in (0, len(prompts) // 2, -1)]
    runs = [follow(engine, submit(engine, group, new)) for group in chosen]
    return {"requests": 1, **requests_line(bench, chosen, runs), **bench.compilations.since()}


def together(bench: Bench, engine: Engine, prompts: Sequence[np.ndarray], one: float) -> dict:
    """All prompts at once, in random order. `one`: tokens a second of one at a time."""
    warm_up(engine, prompts)
    bench.compilations.warm()
    order = np.random.default_rng(1).permutation(len(prompts))
    run = follow(engine, submit(engine, [prompts[i] for i in order], bench.size.new))
    line = requests_line(bench, [prompts], [run])
    return {
        "requests": len(prompts),
        **line,
        "times_one": round(line["tokens_per_s"] / one, 2),
        **bench.compilations.since(),
    }


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


def requests_line(
    bench: Bench, groups: Sequence[Sequence[np.ndarray]], runs: Sequence[Times]
) -> dict:
    """Figures of groups of prompts, each of which ran together."""
    first = [ms for run in runs for ms in run.first]
    lengths = [prompt.size for group in groups for prompt in group]
    made, total = len(first) * bench.size.new, sum(run.total for run in runs)
    least = sum(least_ms(bench, group) for group in groups)
    return {
        "prompts": [min(lengths), max(lengths)],
        "prompt_tokens": sum(lengths),
        "new_tokens": bench.size.new,
        "chunk": bench.size.chunk,
        "steps": bench.size.steps,
        "tokens_per_s": round(made / total * 1e3, 1),  # prompts included in the time
        "limit_tokens_per_s": round(made / least * 1e3, 1),
        "times_limit": round(total / least, 3),
        "first_token_ms": summary(first, 2) | percentiles(first),
        "longest_gap_ms": round(max(gap for run in runs for gap in run.gaps), 2),
        "finished": len(first),
    }


def least_ms(bench: Bench, prompts: Sequence[np.ndarray]) -> float:
    """The limit of requests that run together: their prompts by the rate of products, then `new`
    tokens of all at once by the copy rate."""
    config, new, card = bench.model.config, bench.size.new, bench.card
    read = sum(read_flops(config, build_inputs(config, prompt)) for prompt in prompts)
    moved = [decode_bytes(config, 1, p.size + new, bench.model.dtype) for p in prompts]
    step = moved[0]["weights"] + sum(one["cache"] for one in moved)
    return (read / card.products + new * step / card.copy) * 1e3


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
