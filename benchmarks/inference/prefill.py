"""Prefill against the length of the prompt, and the time to the first token."""

from collections.abc import Iterator

import numpy as np

from benchmarks.full_size import timed
from benchmarks.inference.card import decode_bytes, read_flops
from benchmarks.inference.sizes import Bench
from infinitevl_jax.inputs.model_inputs import build_inputs


def prefill(bench: Bench) -> Iterator[dict]:
    """One line for each length: `InfiniteVL.prefill`, and from token ids on the host to the first
    token on the host."""
    model, config, rng = bench.model, bench.model.config, np.random.default_rng(0)
    for length in bench.size.prompts:
        ids = [rng.integers(0, 150_000, (1, length)) for _ in range(4)]
        prompts = [build_inputs(config, row) for row in ids]
        fresh, turn = model.init_cache(1), iter(range(10**6))

        def read(prompts=prompts, fresh=fresh, turn=turn):
            return model.prefill(prompts[next(turn) % 4], fresh)

        def first(ids=ids, turn=turn):
            return next(iter(model.stream(ids[next(turn) % 4], max_new_tokens=1, eos_token_ids=[])))

        for call in (read, first):
            timed(call, 1)
        bench.compilations.warm()
        ms = timed(read, bench.size.repeats)
        first_ms = timed(first, bench.size.repeats)
        moved = decode_bytes(config, 1, length, model.dtype)
        yield {
            "prompt": length,
            "ms": ms,
            "first_token_ms": first_ms,
            "tokens_per_s": round(length / ms["median"] * 1e3, 1),
            **bench.card.beside(ms["median"], sum(moved.values()), read_flops(config, prompts[0])),
            **bench.compilations.since(),
        }
