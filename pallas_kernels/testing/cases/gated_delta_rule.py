"""Cases of the gated delta rule."""

from collections.abc import Iterator

import numpy as np

from pallas_kernels.testing.cases.problem import Case, Problem, mesh_pieces, mesh_shapes
from pallas_kernels.testing.parity import GATES, alike, fresh_gates, packing, padding, unit


def gated_delta_rule_cases(longest: int) -> Iterator[Case]:
    """K = 128, V = 256, 2 heads. Every kind of gate, with random keys, one repeated key, and keys
    like each other. Fewer key heads than value heads."""

    def case(
        name,
        length,
        gates="mild",
        keys="random",
        pieces=(),
        counts=(),
        start=True,
        heads=2,
        key_heads=None,
        rows=1,
        **how,
    ):
        def make():
            rng = np.random.default_rng(length)
            batch = len(counts) or rows
            lead = batch, length, heads
            keys_shape = batch, length, key_heads or heads, 128
            k = unit(rng, keys_shape)
            inputs = {
                "q": unit(rng, keys_shape) * 128**-0.5,
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
    grouped = "grouped value heads"
    for length in (1, 65):
        yield case(grouped, length, "spread", heads=4, key_heads=2)
    yield case(f"{grouped}, pads", 130, "mild", counts=(130, 64, 0, 1), heads=4, key_heads=2)
    yield case(
        f"{grouped}, packed, alike keys", 300, "spread", "alike", pieces=(37, 1, 64, 2, 150),
        heads=6, key_heads=2,
    )  # fmt: skip
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
