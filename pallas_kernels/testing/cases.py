"""The cases that every implementation of an operator runs: the sizes of the published model, and
what breaks such operators."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.attention import Mask
from pallas_kernels.attention.state import KVCache
from pallas_kernels.gated_delta_rule.api import Inputs, Weights
from pallas_kernels.gated_delta_rule.state import DeltaState
from pallas_kernels.testing.parity import GATES, alike, fresh_gates, packing, padding, unit


class Problem(NamedTuple):
    """Arrays of one call, and which rows of which are pads. Those in float64 take the dtype of a
    cell, the others keep their own."""

    inputs: dict[str, Any]  # arrays and tuples of them; what gradients are taken in
    cotangents: dict[str, np.ndarray]  # of the results; none where there is a forward pass only
    tokens: dict[str, np.ndarray | None]  # ordinals and segments
    rule: dict  # what is not an array
    pads: dict[
        str, str
        # name of an input, or of the result of a cotangent -> name of the ordinals that tell its
        # pads
    ]
    exact: dict[
        str, np.ndarray | bool
    ]  # name of a result -> those of its rows that must be the reference's bit for bit


@dataclass(frozen=True)
class Case:
    """A name, and how the problem comes about. dtypes: what it is run in."""

    name: str
    make: Callable[[], Problem]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


RESULTS = {
    "attention": ("out", "lse"),
    "gated_delta_rule": ("out", "state"),
    "attention_step": ("out", "k_cache", "v_cache"),
    "gated_delta_rule_step": (
        "out",
        "recurrent_state",
        "q_conv_state",
        "k_conv_state",
        "v_conv_state",
    ),
}


MESH_SHAPES = {
    1024: {16: 8, 8: 1, 4: 2, 2: 1},
    2048: {16: 1, 8: 8, 4: 1, 2: 2},
    4096: {16: 2, 8: 1, 4: 8, 2: 1},
    8192: {16: 1, 8: 2, 4: 1, 2: 8},
    16384: {16: 1, 8: 1, 4: 2, 2: 8},
}
"""Rows of a batch by tokens and by heads, as presets and the shards of meshes have them: every
pair of values occurs. How many thread blocks a kernel starts, and so which of them run beside
each other, depends on all three. In bfloat16, what these train in."""


def mesh_shapes(longest: int) -> Iterator[tuple[int, int, int]]:
    """(tokens, heads, batch)."""
    return (
        (tokens, heads, batch)
        for tokens, row in MESH_SHAPES.items()
        if tokens <= longest
        for heads, batch in row.items()
    )


def mesh_pieces(tokens: int, packed: bool) -> tuple[int, ...]:
    """Lengths of the sequences in a row: one that fills it, or three and some pads."""
    return (tokens // 3, 1, tokens // 2) if packed else (tokens,)


def attention_cases(longest: int) -> Iterator[Case]:
    """16 query heads on 2 key heads would only repeat 4 on 2; widths of the decoder (128), the
    tower (80) and a small model (64)."""

    def case(
        name,
        length,
        mask,
        heads=(4, 2),
        width=128,
        pieces=(),
        pads=(0,),
        cached=0,
        batch=1,
        keys_alike=False,
        **how,
    ):
        """pads: how many end a row, for each row in turn."""

        def make():
            rng = np.random.default_rng(length + width)
            (q_heads, k_heads), keys = heads, length + cached
            token_index, segment_ids = (
                padding([length - pads[row % len(pads)] for row in range(batch)], length),
                None,
            )
            if pieces:
                token_index, segment_ids = (np.tile(x, (batch, 1)) for x in packing(pieces, length))
            q_token_index, k_token_index = (
                np.where(token_index < 0, -1, token_index + cached).astype(np.int32),
                token_index,
            )
            if cached:  # a ring holds its tokens in any order, and some slots not yet
                cached_index = np.stack(
                    [
                        np.where(rng.random(cached) < 0.1, -1, rng.permutation(cached))
                        for _ in range(batch)
                    ]
                )
                k_token_index = np.concatenate([cached_index.astype(np.int32), q_token_index], 1)
            shapes = {"q": (length, q_heads), "k": (keys, k_heads), "v": (keys, k_heads)}
            inputs = {n: rng.standard_normal((batch, *s, width)) for n, s in shapes.items()}
            if keys_alike:
                inputs["k"] = alike(rng, inputs["k"][:, :1], inputs["k"].shape)
            d_out, d_lse = (
                rng.standard_normal((batch, length, q_heads, width)),
                rng.standard_normal((batch, length, q_heads)),
            )
            return Problem(
                inputs,
                {"out": d_out, "lse": np.float32(d_lse)},
                {
                    "q_token_index": q_token_index,
                    "k_token_index": k_token_index,
                    "q_segment_ids": segment_ids,
                    "k_segment_ids": segment_ids,
                },
                {"mask": mask, "scale": width**-0.5},
                {
                    "q": "q_token_index",
                    "k": "k_token_index",
                    "v": "k_token_index",
                    "out": "q_token_index",
                    "lse": "q_token_index",
                },
                {},
            )

        return Case(f"{name}, {length} x {width}", make, **how)

    window = Mask(window=100, aligned=True)
    for length in (1, 63, 65, 300):
        yield case("window", length, window)
    yield case("window", 300, window, width=64)
    yield case(
        "window longer than the row", 130, Mask(window=8192, aligned=True), heads=(8, 1), pads=(5,)
    )
    yield case("no window", 300, Mask(aligned=True), pads=(11,))
    yield case("no window, packed", 300, Mask(aligned=True), pieces=(140, 100))
    yield case("window both ways", 130, Mask(causal=False, window=40, aligned=True), pads=(7,))
    yield case("rows of their own lengths", 130, window, pads=(0, 130, 57), batch=3)
    yield case("pads only", 65, window, pads=(65,))
    yield case("packed", 300, window, pieces=(3, 120, 1, 140), batch=2)
    yield case("sinks", 300, Mask(window=100, sinks=20, aligned=True), pads=(20,))
    yield case("ring", 65, Mask(window=150), cached=200, pads=(4,))
    yield case("ring", 65, Mask(window=150), width=64, cached=200, batch=2)
    yield case("ring, one token", 1, Mask(window=150), cached=200, batch=2)
    yield case(
        "tower, windows",
        300,
        Mask(causal=False, aligned=True),
        heads=(2, 2),
        width=80,
        pieces=(64, 64, 32, 100),
    )
    yield case(
        "tower, slices",
        300,
        Mask(causal=False, aligned=True),
        heads=(2, 2),
        width=80,
        pieces=(200, 70),
    )
    for length in (1000, 10_000, 100_000):
        if length <= longest:
            yield case(
                "window of 700",
                length,
                Mask(window=700, aligned=True),
                heads=(2, 1),
                pieces=(length // 3, length // 2),
            )
    yield case("keys alike", 300, window, keys_alike=True)
    yield case("keys alike, no window", 300, Mask(aligned=True), pads=(11,), keys_alike=True)
    yield case("keys alike, packed", 300, window, pieces=(3, 120, 1, 140), batch=2, keys_alike=True)
    yield case("keys alike, ring", 65, Mask(window=150), cached=200, pads=(4,), keys_alike=True)
    published = Mask(window=8192, aligned=True)
    for length, q_heads, batch in mesh_shapes(longest):
        for kind in ("random", "alike"):
            yield case(
                f"{batch} x {q_heads} heads, {kind} keys",
                length,
                published,
                heads=(q_heads, max(1, q_heads // 8)),
                pieces=mesh_pieces(length, packed=kind == "alike"),
                batch=batch,
                keys_alike=kind == "alike",
                dtypes=("bfloat16",),
            )


def gated_delta_rule_cases(longest: int) -> Iterator[Case]:
    """K = 128, V = 256, 2 heads; every kind of gate, with random keys, with one key again and
    again, and with keys like each other."""

    def case(
        name,
        length,
        gates="mild",
        keys="random",
        pieces=(),
        counts=(),
        start=True,
        heads=2,
        rows=1,
        **how,
    ):
        def make():
            rng = np.random.default_rng(length)
            batch = len(counts) or rows
            lead = batch, length, heads
            k = unit(rng, (*lead, 128))
            inputs = {
                "q": unit(rng, (*lead, 128)) * 128**-0.5,
                "k": np.broadcast_to(k[:, :1], k.shape) if keys == "repeated" else k,
                "v": rng.standard_normal((*lead, 256)),
                "g": np.float32((GATES | {"fresh": fresh_gates})[gates](rng, lead)),
                "beta": np.float32(
                    1 / (1 + np.exp((-0.3 if gates == "fresh" else -2) * rng.standard_normal(lead)))
                ),
                "initial_state": np.float32(rng.standard_normal((batch, heads, 128, 256))),
            }
            if keys == "alike":
                k = alike(rng, 128**0.5 * k[:, :1], k.shape)
                inputs["k"] = k / np.linalg.norm(k, axis=-1, keepdims=True)
            inputs["initial_state"][:, 0, 0, 0] = -0.0  # which a sum with 0 would lose
            if not start:
                del inputs["initial_state"]
            token_index, segment_ids = (padding(counts, length) if counts else None), None
            if pieces:
                token_index, segment_ids = (np.tile(x, (batch, 1)) for x in packing(pieces, length))
            tokens = {
                name: x
                for name, x in (("token_index", token_index), ("segment_ids", segment_ids))
                if x is not None
            }
            cotangents = {
                "out": rng.standard_normal((*lead, 256)),
                "state": np.float32(rng.standard_normal((batch, heads, 128, 256))),
            }
            if token_index is None:
                return Problem(inputs, cotangents, tokens, {}, {}, {})
            pads = dict.fromkeys(("q", "k", "v", "g", "beta", "out"), "token_index")
            return Problem(
                inputs, cotangents, tokens, {}, pads, {"state": (token_index < 0).all(axis=1)}
            )

        return Case(f"{name}, {length}", make, **how)

    for gates in GATES:
        for keys in ("random", "repeated", "alike"):
            yield case(f"gates {gates}, {keys} keys", 130, gates, keys)
    for keys in ("random", "alike"):
        yield case(f"gates fresh, {keys} keys", 300, "fresh", keys, heads=4)
    yield case("packed, alike keys", 300, "spread", "alike", pieces=(37, 1, 64, 2, 150))
    for length in (1, 63, 64, 65, 300):
        yield case("gates spread", length, "spread")
    yield case("no initial state", 100, start=False)
    yield case("packed", 300, "spread", pieces=(37, 1, 64, 2, 150))
    yield case("pads", 130, "spread", counts=(130, 64, 0, 1))
    for length in (1000, 10_000, 100_000):
        if length <= longest:
            yield case("gates mild, packed", length, pieces=(length // 3, length // 2))
    for length, heads, batch in mesh_shapes(longest):
        for gates, keys in (
            ("fresh", "random"),
            ("fresh", "alike"),
            ("spread", "random"),
            ("switch", "alike"),
        ):
            yield case(
                f"{batch} x {heads} heads, gates {gates}, {keys} keys",
                length,
                gates,
                keys,
                pieces=mesh_pieces(length, packed=gates != "fresh"),
                start=False,
                heads=heads,
                rows=batch,
                dtypes=("bfloat16",),
            )


def attention_step_case(
    name: str,
    ordinals: Sequence[Sequence[int]],
    heads: tuple[int, int] = (16, 2),
    width: int = 128,
    capacity: int = 256,
    window: int | None = None,
    keys_alike: bool = False,
) -> Case:
    """ordinals: a row for each token, of its ordinal in each sequence."""

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
            {"window": window, "scale": width**-0.5},
            {"inputs": "token_index"},
            {"out": token_index < 0, "k_cache": True, "v_cache": True},
        )

    return Case(f"{name}, {len(ordinals[0])} x {capacity}", make)


def attention_step_cases(longest: int) -> Iterator[Case]:
    """Rings at every stage: empty, around the ends of Hopper's blocks of 128 slots, about to be
    full, full, wrapped. Those of a case are about as full: the outputs of short ones are so much
    larger that errors of long ones would vanish beside them."""
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
    yield attention_step_case("one block", [[127, 0, 128, -1, 100]], capacity=128)
    yield attention_step_case("one key head", [lengths], heads=(8, 1), capacity=384)
    yield attention_step_case("16 query heads a key head", [lengths], heads=(32, 2))
    yield attention_step_case(
        "more blocks than buffers", [[511, 512, 300, -1] * 4], heads=(64, 8), capacity=512
    )
    yield attention_step_case("narrow heads", [[7, -1, 300]], width=64)
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


def gated_delta_rule_step_case(
    name: str,
    ordinals: Sequence[Sequence[int]],
    heads: int = 16,
    keys: int = 128,
    values: int = 256,
    extreme: bool = False,
    fresh: bool = False,
    keys_alike: bool = False,
) -> Case:
    """ordinals: a row for each token, of its ordinal in each sequence. extreme: gates open or
    shut. fresh: a state of zeros."""

    def make():
        token_index = np.asarray(ordinals, np.int32)
        tokens, batch = token_index.shape
        rng = np.random.default_rng(tokens + batch)
        widths = heads * keys, heads * keys, heads * values

        def gates(spread):
            shape = tokens, batch, heads
            return rng.choice([-spread, spread], shape) if extreme else rng.standard_normal(shape)

        inputs = [rng.standard_normal((tokens, batch, n)) for n in (*widths, heads * values)]
        convolutions = (0.5 * rng.standard_normal((4, n)) for n in widths)
        rates = rng.standard_normal(heads), rng.standard_normal(heads) - 4
        weights = Weights(*convolutions, *rates, 1 + 0.2 * rng.standard_normal(values))
        recurrent_state, *tails = (
            rng.standard_normal(s)
            for s in ((batch, heads, keys, values), *((batch, 3, n) for n in widths))
        )
        state = DeltaState(np.float32(0.3 * recurrent_state), *tails)
        state.recurrent_state[:, 0, 0, 0] = -0.0  # which a sum with 0 would lose
        if keys_alike:
            direction = state.k_conv_state[:, :1]
            inputs[1] = alike(rng, direction[:, 0], inputs[1].shape)
            state = state._replace(k_conv_state=alike(rng, direction, state.k_conv_state.shape))
        if fresh:
            state = DeltaState(*map(np.zeros_like, state))
        return Problem(
            {
                "inputs": (Inputs(*inputs, gates(40.0), gates(20.0)),),
                "weights": (weights,),
                "state": state,
            },
            {},
            {"token_index": token_index},
            {"eps": 1e-5},
            {"inputs": "token_index"},
            {
                "out": token_index < 0,
                "recurrent_state": (token_index < 0).all(axis=0),
                "q_conv_state": True,
                "k_conv_state": True,
                "v_conv_state": True,
            },
        )

    return Case(f"{name}, {len(ordinals[0])}", make)


def gated_delta_rule_step_cases(longest: int) -> Iterator[Case]:
    """The published sizes; most of two tokens in a row."""
    several = [5, -1, 0, 9, -1, 7]
    rows = [several, [6, -1, 1, 10, 0, -1]]
    yield gated_delta_rule_step_case("one token", [[5]])
    yield gated_delta_rule_step_case("still", [[-1]])
    yield gated_delta_rule_step_case("one token", [several])
    yield gated_delta_rule_step_case("two tokens", [[5], [6]])
    yield gated_delta_rule_step_case("two tokens", rows)
    yield gated_delta_rule_step_case("extreme gates", rows, extreme=True)
    yield gated_delta_rule_step_case("fresh state", [[0] * 3, [1] * 3], fresh=True)
    yield gated_delta_rule_step_case(
        "extreme gates, fresh state", [[0] * 3, [1] * 3], extreme=True, fresh=True
    )
    yield gated_delta_rule_step_case("keys alike", [*rows, [7, 6, 2, 11, 1, 8]], keys_alike=True)
    yield gated_delta_rule_step_case(
        "extreme gates, keys alike", rows, extreme=True, keys_alike=True
    )
    yield gated_delta_rule_step_case("values 64 wide", rows, values=64)
    yield gated_delta_rule_step_case("values 80 wide", rows, values=80)
    yield gated_delta_rule_step_case("keys 64 wide", rows, keys=64)
    yield gated_delta_rule_step_case("three heads", rows, heads=3)


CASES = {
    "attention": attention_cases,
    "gated_delta_rule": gated_delta_rule_cases,
    "attention_step": attention_step_cases,
    "gated_delta_rule_step": gated_delta_rule_step_cases,
}
