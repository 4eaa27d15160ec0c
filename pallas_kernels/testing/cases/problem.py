"""What a case of the parity matrix is, and what the operators' cases share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class Problem(NamedTuple):
    """The arguments of one call. float64 arrays take the dtype of a cell, others keep theirs."""

    inputs: dict[str, Any]  # arrays or tuples of them: gradients are taken in these
    cotangents: dict[str, np.ndarray]  # of the results; empty: forward only
    tokens: dict[str, np.ndarray | None]  # token indices and segment ids
    rule: dict  # what is not an array
    # Name of an input, or of the result of a cotangent -> name of the token index that tells its
    # pads.
    pads: dict[str, str]
    # Name of a result -> which of its rows must equal the reference bit for bit.
    exact: dict[str, np.ndarray | bool]


@dataclass(frozen=True)
class Case:
    """A named problem. dtypes: those that it is run in."""

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
    "projection": ("out",),
    "short_conv": ("out", "conv_state"),
}

MESH_SHAPES = {
    1024: {16: 8, 8: 1, 4: 2, 2: 1},
    2048: {16: 1, 8: 8, 4: 1, 2: 2},
    4096: {16: 2, 8: 1, 4: 8, 2: 1},
    8192: {16: 1, 8: 2, 4: 1, 2: 8},
    16384: {16: 1, 8: 1, 4: 2, 2: 8},
}
"""Batch size by tokens and heads, as presets and mesh shards have them. Every pair of two of the
three occurs: all three decide how many thread blocks a kernel starts, and which run together. These
cases are in bfloat16, the training dtype."""


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
