"""Cases of attention."""

from collections.abc import Iterator

import numpy as np

from pallas_kernels.attention import Mask
from pallas_kernels.testing.cases.problem import Case, Problem, mesh_pieces, mesh_shapes
from pallas_kernels.testing.parity import alike, packing, padding


def attention_cases(longest: int) -> Iterator[Case]:
    """Heads as wide as those of the decoder (128), the tower (80), a small model (64) and other
    hybrid models (256). 16 query heads on 2 key heads would only repeat 4 on 2."""

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
        """pads: how many are at the end of a row, for each row in turn."""

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
            if cached:  # a ring holds its tokens in any order; some slots are empty
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
    yield case("wide heads, window", 65, window, width=256, pads=(4,))
    yield case("wide heads, packed", 300, Mask(aligned=True), width=256, pieces=(140, 1, 97))
    yield case("wide heads, ring", 65, Mask(window=150), width=256, cached=200, batch=2)
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
