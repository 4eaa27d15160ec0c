"""Cases of attention's one-token step."""

from collections.abc import Iterator, Sequence

import numpy as np

from pallas_kernels.attention.state import KVCache
from pallas_kernels.testing.cases.problem import Case, Problem
from pallas_kernels.testing.parity import alike


def attention_step_case(
    name: str,
    ordinals: Sequence[Sequence[int]],
    heads: tuple[int, int] = (16, 2),
    width: int = 128,
    capacity: int = 256,
    window: int | None = None,
    sinks: int = 0,
    keys_alike: bool = False,
) -> Case:
    """ordinals: a row for each token, of its index in each sequence (-1: no token)."""

    def make():
        q_heads, k_heads = heads
        token_index = np.asarray(ordinals, np.int32)
        tokens, batch = token_index.shape
        rng = np.random.default_rng(capacity + batch)
        qkv = tuple(
            rng.standard_normal((tokens, batch, n, width)) for n in (q_heads, k_heads, k_heads)
        )
        kv_cache = KVCache(
            *(rng.standard_normal((batch, capacity, k_heads, width)) for _ in range(2))
        )
        if keys_alike:
            q, k, v = qkv
            direction = kv_cache.k[:, :1]
            qkv, kv_cache = (
                (q, alike(rng, direction[:, 0], k.shape), v),
                KVCache(alike(rng, direction, kv_cache.k.shape), kv_cache.v),
            )
        return Problem(
            {"inputs": qkv, "weights": (), "state": kv_cache},
            {},
            {"token_index": token_index},
            {"window": window, "scale": width**-0.5, "sinks": sinks},
            {"inputs": "token_index"},
            {"out": token_index < 0, "k_cache": True, "v_cache": True},
        )

    return Case(f"{name}, {len(ordinals[0])} x {capacity}", make)


def attention_step_cases(longest: int) -> Iterator[Case]:
    """Rings at every stage: empty, around the ends of Hopper's blocks of 128 slots, about to be
    full, full, wrapped. The rings of one case are about equally full: outputs of short sequences
    are so much larger that they would hide the errors of long ones."""
    for length in (0, 5, 255, 256, 100_000):
        yield attention_step_case(f"a sequence of {length}", [[length]])
    yield attention_step_case("still", [[-1]])
    yield attention_step_case("short", [[0, 5, -1, 1]])
    lengths = [256, -1, 127, 128, 129, 254, 255, 257, 1000, 100_000]
    after = [257, -1, 128, 129, -1, 255, 256, 258, 1001, 100_001]
    yield attention_step_case("two tokens", [lengths, after])
    yield attention_step_case("window of 100", [lengths], window=100)
    yield attention_step_case("window of 1", [lengths], window=1)
    yield attention_step_case("window longer than the ring", [lengths], window=8192)
    yield attention_step_case("sinks", [lengths, after], window=100, sinks=20, capacity=120)
    yield attention_step_case("one block", [[127, 0, 128, -1, 100]], capacity=128)
    yield attention_step_case("one key head", [lengths], heads=(8, 1), capacity=384)
    yield attention_step_case("16 query heads a key head", [lengths], heads=(32, 2))
    yield attention_step_case(
        "more blocks than buffers", [[511, 512, 300, -1] * 4], heads=(64, 8), capacity=512
    )
    yield attention_step_case("narrow heads", [[7, -1, 300]], width=64)
    yield attention_step_case("wide heads", [[7, -1, 300]], width=256)
    yield attention_step_case("small groups", [[7, -1, 300]], heads=(4, 2))
    yield attention_step_case("an odd ring", [[7, -1, 300]], capacity=100)
    yield attention_step_case("keys alike", [lengths, after], keys_alike=True)
    yield attention_step_case(
        "keys alike, small groups", [[7, -1, 300]], heads=(4, 2), keys_alike=True
    )
    if longest >= 8192:
        yield attention_step_case(
            "published sizes", [[8192, -1, 4000, 8191, 8193, 100_000]], capacity=8192, window=8192
        )
