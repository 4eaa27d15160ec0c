"""Cases of the projection."""

from collections.abc import Iterator

import numpy as np

from pallas_kernels.testing.cases.problem import Case, Problem

PUBLISHED = {
    "inputs of a Gated DeltaNet layer": (2048, 12352, {"norm": True}),
    "output of a Gated DeltaNet layer": (4096, 2048, {"residual": True}),
    "inputs of an attention layer": (2048, 2560, {"norm": True, "bias": True}),
    "output of an attention layer": (2048, 2048, {"residual": True}),
    "gates and ups": (2048, 11008, {"norm": True, "gated": True}),
    "down": (11008, 2048, {"residual": True}),
    "head": (2048, 151936, {"norm": True, "transposed": True}),
}
"""Products of the published model: K, N and what stands around them. The 12,320 columns of q, k, v,
gate, a and b are filled up to a multiple of 64."""


def projection_case(
    name: str,
    rows: int,
    inputs: int,
    outputs: int,
    gated: bool = False,
    transposed: bool = False,
    bias: bool = False,
    residual: bool = False,
    norm: bool = False,
    extreme: bool = False,
    prefetch: tuple[int, ...] | None = None,
) -> Case:
    """prefetch: shape of a matrix that follows. extreme: rows from 1e-4 to 1e4 in size and one of
    zeros, single large inputs and columns, as hidden states of large models have them; gates open
    or shut."""

    def make():
        rng = np.random.default_rng(rows + inputs)
        pair = (2,) if gated else ()
        x = rng.standard_normal((rows, inputs))
        shape = (*pair, outputs, inputs) if transposed else (inputs, *pair, outputs)
        weight = rng.standard_normal(shape) * inputs**-0.5
        if extreme:
            x *= 10 ** rng.uniform(-4, 4, (rows, 1))
            x[:, ::97] *= 300
            x[rows // 2] = 0
            weight *= 10 ** rng.uniform(-2, 2, shape[-2:] if transposed else shape[-1:])
        given = {
            "x": x,
            "weight": weight,
            "bias": rng.standard_normal((*pair, outputs)) if bias else None,
            "residual": rng.standard_normal((rows, outputs)) if residual else None,
            "norm": 1 + 0.5 * rng.standard_normal(inputs) if norm else None,
            "prefetch": None if prefetch is None else rng.standard_normal(prefetch),
        }
        return Problem(given, {}, {}, {"eps": 1e-6, "transposed": transposed}, {}, {})

    return Case(f"{name}, {rows} x {inputs} x {outputs}", make)


def projection_cases(longest: int) -> Iterator[Case]:
    """Every number of rows that fills tensor cores differently; every epilogue. The published sizes
    are among them from 8,192 on, though nothing here is long."""
    for rows in (1, 2, 3, 7, 8, 9, 16, 17):
        yield projection_case("plain", rows, 512, 128)
    everything = {"bias": True, "residual": True, "norm": True}
    yield projection_case("in four parts", 3, 2048, 128, **everything)
    yield projection_case("a last piece of x", 2, 4608, 64, **everything)
    yield projection_case("norm", 1, 1024, 64, norm=True)
    yield projection_case("gated", 3, 1024, 128, gated=True, **everything)
    yield projection_case("before another", 2, 1024, 128, norm=True, prefetch=(512, 192))
    yield projection_case("before a gated one", 1, 512, 64, prefetch=(1024, 2, 64))
    yield projection_case("before an odd one", 1, 512, 64, prefetch=(100, 90))
    yield projection_case("gated, two groups", 11, 1024, 64, gated=True, norm=True)
    yield projection_case("transposed", 5, 1024, 192, transposed=True, norm=True)
    yield projection_case("transposed, gated", 2, 512, 64, gated=True, transposed=True, bias=True)
    yield projection_case("extreme", 8, 1024, 128, extreme=True, norm=True)
    yield projection_case("extreme", 16, 2048, 64, extreme=True, bias=True, residual=True)
    yield projection_case("extreme, gated", 3, 1024, 64, extreme=True, gated=True, norm=True)
    yield projection_case("odd columns", 2, 512, 100, bias=True)
    yield projection_case("odd inputs", 2, 333, 128, norm=True)
    yield projection_case("tiny", 3, 24, 10, gated=True, norm=True)
    yield projection_case("more tiles than clusters", 3, 2048, 40 * 64, norm=True)
    if longest >= 8192:
        for name, (inputs, outputs, around) in PUBLISHED.items():
            for rows in (8,) if name == "head" else (1, 3, 8, 16):
                yield projection_case(name, rows, inputs, outputs, **around)
