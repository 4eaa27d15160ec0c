"""The cases that every implementation of an operator runs: the sizes of the published model, and what breaks such operators."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pallas_kernels.attend import Mask
from pallas_kernels.testing.parity import GATES, packing, padding, unit


class Problem(NamedTuple):
    """Arrays of one call in float64, and which rows of which are pads."""

    inputs: dict[str, np.ndarray]  # what gradients are taken in
    cotangents: tuple[np.ndarray, ...]  # of the results
    tokens: dict[str, np.ndarray | None]  # ordinals and segments
    rule: dict  # what is not an array
    pads: dict[str, str]  # name of an input -> name of the ordinals that tell its pads
    exact: tuple[str, ...]  # inputs that stay float32 where the others are bfloat16


@dataclass(frozen=True)
class Case:
    """A name, and how the problem comes about."""

    name: str
    make: Callable[[], Problem]


RESULTS = {"attend": ("out", "lse"), "gated_delta_rule": ("out", "state")}


def attend_cases(longest: int) -> Iterator[Case]:
    """16 query heads on 2 key heads would only repeat 4 on 2; widths of the decoder (128), the tower (80) and a small model (64)."""

    def case(name, length, mask, heads=(4, 2), width=128, pieces=(), pads=(0,), cached=0, batch=1):
        """pads: how many end a row, for each row in turn."""

        def make():
            rng = np.random.default_rng(length + width)
            (q_heads, k_heads), keys = heads, length + cached
            index, segment = padding([length - pads[row % len(pads)] for row in range(batch)], length), None
            if pieces:
                index, segment = (np.tile(x, (batch, 1)) for x in packing(pieces, length))
            q_index, k_index = np.where(index < 0, -1, index + cached).astype(np.int32), index
            if cached:  # a ring holds its tokens in any order, and some slots not yet
                ring = np.stack([np.where(rng.random(cached) < 0.1, -1, rng.permutation(cached)) for _ in range(batch)])
                k_index = np.concatenate([ring.astype(np.int32), q_index], 1)
            shapes = {"q": (length, q_heads), "k": (keys, k_heads), "v": (keys, k_heads)}
            return Problem(
                {n: rng.standard_normal((batch, *s, width)) for n, s in shapes.items()},
                (rng.standard_normal((batch, length, q_heads, width)), rng.standard_normal((batch, length, q_heads))),
                {"q_index": q_index, "k_index": k_index, "q_segment": segment, "k_segment": segment},
                {"mask": mask, "scale": width**-0.5},
                {"q": "q_index", "k": "k_index", "v": "k_index"},
                (),
            )

        return Case(f"{name}, {length} x {width}", make)

    window = Mask(window=100, aligned=True)
    for length in (1, 63, 65, 300):
        yield case("window", length, window)
    yield case("window", 300, window, width=64)
    yield case("window longer than the row", 130, Mask(window=8192, aligned=True), heads=(8, 1), pads=(5,))
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
    yield case("tower, windows", 300, Mask(causal=False, aligned=True), heads=(2, 2), width=80, pieces=(64, 64, 32, 100))
    yield case("tower, slices", 300, Mask(causal=False, aligned=True), heads=(2, 2), width=80, pieces=(200, 70))
    for length in (1000, 10_000, 100_000):
        if length <= longest:
            yield case("window of 700", length, Mask(window=700, aligned=True), heads=(2, 1), pieces=(length // 3, length // 2))


def gated_delta_rule_cases(longest: int) -> Iterator[Case]:
    """K = 128, V = 256, 2 heads; every kind of gate, with random keys and with one key again and again."""

    def case(name, length, gates="mild", keys="random", pieces=(), counts=(), start=True):
        def make():
            rng = np.random.default_rng(length)
            batch = len(counts) or 1
            lead = batch, length, 2
            k = unit(rng, (*lead, 128))
            inputs = {
                "q": unit(rng, (*lead, 128)) * 128**-0.5,
                "k": np.broadcast_to(k[:, :1], k.shape) if keys == "repeated" else k,
                "v": rng.standard_normal((*lead, 256)),
                "g": GATES[gates](rng, lead),
                "beta": 1 / (1 + np.exp(-2 * rng.standard_normal(lead))),
                "initial_state": rng.standard_normal((batch, 2, 128, 256)),
            }
            if not start:
                del inputs["initial_state"]
            index, segment = (padding(counts, length) if counts else None), None
            if pieces:
                index, segment = packing(pieces, length)
            tokens = {name: x for name, x in (("index", index), ("segment", segment)) if x is not None}
            cotangents = rng.standard_normal((*lead, 256)), rng.standard_normal((batch, 2, 128, 256))
            pads = dict.fromkeys(("q", "k", "v", "g", "beta"), "index") if index is not None else {}
            return Problem(inputs, cotangents, tokens, {}, pads, ("g", "beta", "initial_state"))

        return Case(f"{name}, {length}", make)

    for gates in GATES:
        for keys in ("random", "repeated"):
            yield case(f"gates {gates}, {keys} keys", 130, gates, keys)
    for length in (1, 63, 64, 65, 300):
        yield case("gates spread", length, "spread")
    yield case("no initial state", 100, start=False)
    yield case("packed", 300, "spread", pieces=(37, 1, 64, 2, 150))
    yield case("pads", 130, "spread", counts=(130, 64, 0, 1))
    for length in (1000, 10_000, 100_000):
        if length <= longest:
            yield case("gates mild, packed", length, pieces=(length // 3, length // 2))


CASES = {"attend": attend_cases, "gated_delta_rule": gated_delta_rule_cases}
