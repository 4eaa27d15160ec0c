"""Cases of the gated delta rule's one-token step."""

from collections.abc import Iterator, Sequence

import numpy as np

from pallas_kernels.columns import Columns
from pallas_kernels.gated_delta_rule.api import Inputs, Weights
from pallas_kernels.gated_delta_rule.state import DeltaState
from pallas_kernels.testing.cases.problem import Case, Problem
from pallas_kernels.testing.parity import alike


def gated_delta_rule_step_case(
    name: str,
    ordinals: Sequence[Sequence[int]],
    heads: int = 16,
    key_heads: int | None = None,
    keys: int = 128,
    values: int = 256,
    extreme: bool = False,
    fresh: bool = False,
    keys_alike: bool = False,
    joint: int | None = None,
) -> Case:
    """ordinals: a row for each token, of its index in each sequence (-1: no token). key_heads: None
    is as many as heads. extreme: gates open or shut. fresh: a state of zeros. joint: inputs are
    columns of one array, whose rows are filled up to a multiple of it."""

    def make():
        token_index = np.asarray(ordinals, np.int32)
        tokens, batch = token_index.shape
        rng = np.random.default_rng(tokens + batch)
        q_width = (key_heads or heads) * keys
        widths = q_width, q_width, heads * values

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
        given = Inputs(*inputs, gates(40.0), gates(20.0))
        if joint is not None:
            array, ends = np.concatenate(given, -1), np.cumsum([x.shape[-1] for x in given])
            array = np.pad(array, ((0, 0), (0, 0), (0, -array.shape[-1] % joint)))
            starts = [int(end) - x.shape[-1] for end, x in zip(ends, given, strict=True)]
            places = zip(starts, given, strict=True)
            given = Inputs(*[Columns(array, start, x.shape[-1]) for start, x in places])
        return Problem(
            {
                "inputs": (given,),
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
    yield gated_delta_rule_step_case("joint projection", [[5], [6]], joint=64)
    yield gated_delta_rule_step_case("joint projection", rows, joint=64, extreme=True)
    yield gated_delta_rule_step_case("joint projection, three heads", rows, heads=3, joint=64)
    yield gated_delta_rule_step_case("joint projection, one head", [[5], [6]], heads=1, joint=64)
    yield gated_delta_rule_step_case("joint projection, odd rows", rows, heads=3, joint=1)
    yield gated_delta_rule_step_case("values 64 wide", rows, values=64)
    yield gated_delta_rule_step_case("values 80 wide", rows, values=80)
    yield gated_delta_rule_step_case("keys 64 wide", rows, keys=64)
    yield gated_delta_rule_step_case("three heads", rows, heads=3)
    yield gated_delta_rule_step_case("one head", [[5], [6]], heads=1)
    yield gated_delta_rule_step_case("grouped value heads", rows, heads=6, key_heads=2)
    yield gated_delta_rule_step_case(
        "grouped value heads, keys alike", rows, heads=4, key_heads=1, keys_alike=True
    )
