"""How chunk scans for Hopper are cut into spans: which, by how many blocks, and the states between
them. (What the kernels make of a
span: test_mosaic_gpu_interpreted.py.)"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta_rule import reference
from pallas_kernels.gated_delta_rule.hopper import gated_delta_rule as delta_hopper
from pallas_kernels.gated_delta_rule.hopper.spans import (
    KEY,
    compose,
    cut,
    place,
    spans_of,
    transition_blocks,
)
from pallas_kernels.gated_delta_rule.tuning import HopperSpans as HopperDeltaSpans
from pallas_kernels.hardware import HOPPER_MULTIPROCESSORS
from pallas_kernels.testing.parity import rel_rms, unit


def test_cut_where_multiprocessors_are_idle():
    for rows, parts, count in itertools.product(
        (1, 2, 3, 4, 8, 16, 20, 33, 200), (1, 2, 4), (1, 16, 31, 32, 33, 100, 128, 2048)
    ):
        spans = spans_of(rows, parts, count)
        lengths = [int(cut(count, spans, span)[1]) for span in range(spans)]
        assert sum(lengths) == count and min(lengths) > 0
        if spans > 1:
            assert (
                rows * spans * parts <= HOPPER_MULTIPROCESSORS
                and rows * transition_blocks(spans, parts) <= HOPPER_MULTIPROCESSORS
            )
            assert lengths[0] >= HopperDeltaSpans.shortest and count >= HopperDeltaSpans.row
    assert [spans_of(heads, 4, 128) for heads in (32, 16, 8, 4, 1)] == [1, 2, 4, 6, 8]
    assert (
        spans_of(16, 4, 128, back=True) == spans_of(16, 4, 129) == 1
        and spans_of(8, 4, 129, back=True) == 4
    )


@pytest.mark.parametrize(("count", "spans"), [(10, 3), (9, 3), (7, 1), (64, 7)])
def test_spans_follow_each_other(count, spans):
    placed = [cut(count, spans, span) for span in range(spans)]
    assert [n for first, number in placed for n in range(int(first), int(first + number))] == list(
        range(count)
    )


@pytest.mark.parametrize(("spans", "parts"), [(2, 4), (3, 1), (8, 2)])
def test_each_block_has_its_own_columns(spans, parts):
    span, part = place(jnp.arange(transition_blocks(spans, parts)), parts)
    wanted = [(0, p) for p in range(parts)] + [
        (s, p) for s in range(1, spans - 1) for p in range(parts + KEY // 64)
    ]
    assert list(zip(span.tolist(), part.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("backward", [False, True])
def test_states_between_spans(backward):
    """From span transitions by the recurrence in float64, those of the recurrence without
    spans."""
    rng, (count, spans, heads, width) = np.random.default_rng(0), (7, 3, 2, 5)
    lead = 1, count, heads
    q, k, v = unit(rng, (*lead, KEY)), unit(rng, (*lead, KEY)), rng.standard_normal((*lead, width))
    g, beta = -rng.random(lead), rng.random(lead)
    first, d_out = rng.standard_normal((1, heads, KEY, width)), rng.standard_normal((*lead, width))
    nothing, identity = np.zeros_like(first), np.broadcast_to(np.eye(KEY), (1, heads, KEY, KEY))

    def forward(state, values, at):
        return reference.gated_delta_rule(
            q[:, at], k[:, at], values[:, at], g[:, at], beta[:, at], state
        )

    def chunk_scan(state, share, at):
        """The state after some tokens, or the gradient of the state before them from that of the
        state after."""
        at, values = slice(*at), share * np.resize(v, (*lead, state.shape[3]))
        if not backward:
            return forward(state, values, at)[1]
        _, pull = jax.vjp(partial(forward, values=values, at=at), jnp.zeros_like(state))
        cotangent = share * np.resize(d_out, (*lead, state.shape[3]))[:, at]
        return pull((jnp.asarray(cotangent), state))[0]

    with jax.enable_x64(True):
        tokens = [
            (int(a), int(a + n)) for a, n in (cut(count, spans, span) for span in range(spans))
        ][:: -1 if backward else 1]
        transitions = [jnp.concatenate([chunk_scan(jnp.asarray(first), 1, tokens[0]), identity], 3)]
        transitions += [
            jnp.concatenate(
                [chunk_scan(jnp.asarray(nothing), 1, at), chunk_scan(jnp.asarray(identity), 0, at)],
                3,
            )
            for at in tokens[1:-1]
        ]
        got = compose(jnp.asarray(first), jnp.stack(transitions, 2))
        want = first
        for span, at in enumerate(tokens):
            assert rel_rms(got[:, :, span], want) < 1e-13
            want = chunk_scan(jnp.asarray(want), 1, at)


@pytest.mark.parametrize("backward", [False, True])
def test_cut_walks_lower_for_cuda(backward):
    wide = [jax.ShapeDtypeStruct((1, 4100, 2, width), jnp.bfloat16) for width in (128, 128, 256)]
    inputs = *wide, *[jax.ShapeDtypeStruct((1, 4100, 2), jnp.float32)] * 2

    def run(*inputs):
        results, pull = jax.vjp(delta_hopper.gated_delta_rule, *inputs)
        return pull(results) if backward else results

    text = jax.jit(run).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    kernels = ["gdn_span_transitions"] + ["gdn_span_transitions_backward"] * backward
    assert spans_of(2, 4, 65) == 4 and all(name in text for name in kernels)
