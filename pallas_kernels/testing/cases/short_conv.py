"""Cases of the short convolution."""

from collections.abc import Iterator, Sequence

import numpy as np

from pallas_kernels.columns import Columns
from pallas_kernels.testing.cases.problem import Case, Problem, mesh_pieces
from pallas_kernels.testing.parity import packing, padding


def short_conv_case(
    name: str,
    length: int,
    channels: int = 128,
    pieces: Sequence[int] = (),
    counts: Sequence[int] = (),
    start: bool = True,
    joint: int | None = None,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> Case:
    """pieces: lengths of packed sequences. counts: valid tokens of each row. start: inputs before
    the call. joint: x is columns of a larger array, from so many columns on."""

    def make():
        rng = np.random.default_rng(length + channels)
        batch = len(counts) or 1
        shape, state = (batch, length, channels), (batch, 3, channels)
        x = rng.standard_normal(shape)
        if joint is not None:
            around = rng.standard_normal((batch, length, joint + 32))
            whole = np.concatenate([around[..., :joint], x, around[..., joint:]], -1)
            x = Columns(whole, joint, channels)
        inputs = {"x": x, "weight": rng.standard_normal((4, channels))}
        if start:
            inputs["conv_state"] = rng.standard_normal(state)
        tokens = {"token_index": padding(counts, length)} if counts else {}
        if pieces:
            tokens = dict(zip(("token_index", "segment_ids"), packing(pieces, length), strict=True))
        cotangents = {
            "out": rng.standard_normal(shape),
            "conv_state": rng.standard_normal(state),
        }
        pads = {"x": "token_index", "out": "token_index"} if tokens else {}
        exact = {"out": tokens["token_index"] < 0} if tokens else {}
        return Problem(inputs, cotangents, tokens, {}, pads, exact)

    return Case(f"{name}, {length} x {channels}", make, dtypes)


def short_conv_cases(longest: int) -> Iterator[Case]:
    """Lengths around a block of tokens, each width of a block of channels; the published sizes."""
    yield short_conv_case("whole", 16)
    yield short_conv_case("whole", 37, 256)
    yield short_conv_case("nothing before", 20, start=False)
    yield short_conv_case("few tokens", 5)
    yield short_conv_case("pads", 65, 512, counts=(65, 40, 1, 0))
    yield short_conv_case("packed", 130, pieces=(16, 1, 2, 47, 30))
    yield short_conv_case("packed, nothing before", 64, 384, pieces=(3, 61), start=False)
    yield short_conv_case("odd channels", 33, 100, counts=(30,))
    yield short_conv_case("joint", 40, joint=64)
    yield short_conv_case("joint, pads", 70, 256, counts=(70, 13), joint=64)
    yield short_conv_case("joint, odd columns", 50, joint=3)
    yield short_conv_case("joint, packed", 50, pieces=(20, 21), joint=64)
    for tokens in (n for n in (256, 8192, longest) if n >= 256 and longest >= n):
        for channels in (1024, 2048, 4096):
            more = {"pieces": mesh_pieces(tokens, True), "dtypes": ("bfloat16",)}
            yield short_conv_case("published, packed", tokens, channels, **more)
            yield short_conv_case("published", tokens, channels, joint=64, dtypes=("bfloat16",))
