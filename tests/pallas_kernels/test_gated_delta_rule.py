"""The chunked gated delta rule against transformers' torch functions and against the float64
recurrence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from pallas_kernels.gated_delta_rule import gated_delta_rule, reference, xla
from pallas_kernels.gated_delta_rule.hopper import gated_delta_rule as delta_hopper
from pallas_kernels.gated_delta_rule.tpu import gated_delta_rule as delta_tpu
from pallas_kernels.testing import parity
from pallas_kernels.testing.cells import ALLOWED
from pallas_kernels.testing.parity import GATES, LENGTHS, poison, rel_rms, unit

TOLERANCE = 1e-5
INPUTS = ("q", "k", "v", "g", "beta", "initial_state")
chunked = parity.with_gradients(gated_delta_rule)
truth = parity.in_float64(parity.with_gradients(reference.gated_delta_rule, optimise=True))


def case(length, gates="mild", keys="random", batch=1, heads=2, key_dim=16, value_dim=32, seed=0):
    """Inputs and cotangents, float32."""
    rng = np.random.default_rng(seed)
    lead = (batch, length, heads)
    k = unit(rng, (*lead, key_dim))
    if keys == "repeated":
        k = np.broadcast_to(k[:, :1], k.shape)
    beta = 1 / (1 + np.exp(-2 * rng.standard_normal(lead)))
    inputs = (
        unit(rng, (*lead, key_dim)),
        k,
        rng.standard_normal((*lead, value_dim)),
        GATES[gates](rng, lead),
        beta,
        rng.standard_normal((batch, heads, key_dim, value_dim)),
    )
    cotangents = (
        rng.standard_normal((*lead, value_dim)),
        rng.standard_normal((batch, heads, key_dim, value_dim)),
    )
    return tuple(np.float32(x) for x in inputs), tuple(np.float32(x) for x in cotangents)


NAMES = ("out", "state", *(f"d_{name}" for name in INPUTS))
EXACT = dict.fromkeys(NAMES, TOLERANCE)


def assert_close(got, want, allowed=EXACT):
    """Both are (results, gradients)."""
    errors = {
        name: rel_rms(a, b)
        for name, a, b in zip(NAMES, (*got[0], *got[1]), (*want[0], *want[1]), strict=True)
    }
    assert all(error <= allowed[name] for name, error in errors.items()), errors


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_float64_recurrence(length):
    for gates in GATES:
        for keys in ("random", "repeated"):
            inputs, cotangents = case(length, gates, keys)
            assert_close(chunked(inputs, cotangents), truth(inputs, cotangents))


def test_equals_float64_recurrence_at_full_head_size():
    inputs, cotangents = case(80, "spread", heads=1, key_dim=128, value_dim=256)
    assert_close(chunked(inputs, cotangents), truth(inputs, cotangents))


def test_gates_beyond_float32_range():
    inputs, cotangents = case(65, "spread")
    g = inputs[3].copy()
    g[0, ::7], g[0, 3::11] = -np.inf, -1e6
    got, want = (run((*inputs[:3], g, *inputs[4:]), cotangents) for run in (chunked, truth))
    assert_close(got, want)


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_torch(length):
    for name, gates in (
        ("recurrent", "spread"),
        ("recurrent", "forget"),
        ("chunk", "mild"),
        ("chunk", "keep"),
    ):
        (q, k, v, g, beta, state), cotangents = case(length, gates)
        function = getattr(theirs, f"torch_{name}_gated_delta_rule")
        arrays = (torch.from_numpy(np.array(x)) for x in (q, k, v, g, beta))
        want = function(*arrays, initial_state=torch.from_numpy(state), output_final_state=True)
        scaled = q * np.float32(q.shape[-1] ** -0.5)  # theirs scales q itself
        got, _ = chunked((scaled, k, v, g, beta, state), cotangents)
        assert max(rel_rms(a, b.numpy()) for a, b in zip(got, want, strict=True)) <= TOLERANCE, (
            name,
            gates,
        )


def test_packed_equals_unpacked():
    pieces, length = (37, 1, 64, 2, 70), 190
    token_index, segment_ids = parity.packing(pieces, length)
    inputs, cotangents = case(length, "spread")
    packed = chunked(inputs, cotangents, {"token_index": token_index, "segment_ids": segment_ids})
    assert_close(
        packed, truth(inputs, cotangents, {"token_index": token_index, "segment_ids": segment_ids})
    )

    starts = np.cumsum([0, *pieces[:-1]])
    rows = np.stack([np.minimum(start + np.arange(70), length - 1) for start in starts])
    apart = [x[0][rows] for x in inputs[:5]]  # one sequence a row
    state, ct_state = (
        np.zeros((len(pieces), *x.shape[1:]), np.float32) for x in (inputs[5], cotangents[1])
    )
    state[0], ct_state[-1] = inputs[5][0], cotangents[1][0]
    unpacked_index = parity.padding(pieces, 70)
    results, gradients = chunked(
        (*apart, state), (cotangents[0][0][rows], ct_state), {"token_index": unpacked_index}
    )

    def join(x):
        return np.concatenate([row[:n] for row, n in zip(x, pieces, strict=True)])[None]

    used = sum(pieces)
    assert not any(np.any(x[:, used:]) for x in (packed[0][0], *packed[1][:5]))
    trimmed = (
        (packed[0][0][:, :used], packed[0][1]),
        (*(x[:, :used] for x in packed[1][:5]), packed[1][5]),
    )
    joined = (
        (join(results[0]), results[1][-1:]),
        (*(join(x) for x in gradients[:5]), gradients[5][:1]),
    )
    assert_close(trimmed, joined)


def test_pads_anywhere_and_returning_segments():
    inputs, cotangents = case(150, "spread", batch=3)
    rng = np.random.default_rng(1)
    token_index = np.where(rng.random((3, 150)) < 0.3, -1, 0).astype(np.int32)
    token_index[0, :70], token_index[1] = -1, -1
    segment_ids = rng.choice([0, 1], (3, 150), p=[0.9, 0.1]).astype(np.int32)
    others = {"token_index": token_index, "segment_ids": segment_ids}
    got = chunked(inputs, cotangents, others)
    assert_close(got, truth(inputs, cotangents, others))
    assert got[0][1][1].tobytes() == inputs[5][1].tobytes()

    ruined = [poison(x, token_index) for x in inputs[:5]]
    again = chunked(
        (*ruined, inputs[5]), (poison(cotangents[0], token_index), cotangents[1]), others
    )
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("length", (1, 130))
def test_only_pads_leave_the_state_bit_identical(length):
    inputs, cotangents = case(length, "spread", batch=2)
    state = inputs[5].copy()
    state[0, 0, 0, :3] = -0.0, 1e-42, 1e30
    token_index = np.full((2, length), -1, np.int32)
    token_index[1, 0] = 0
    ruined = [poison(x, token_index) for x in inputs[:5]]
    (out, last), gradients = chunked((*ruined, state), cotangents, {"token_index": token_index})
    assert last[0].tobytes() == state[0].tobytes() and not out[0].any()
    assert not np.array_equal(last[1], state[1])
    np.testing.assert_array_equal(gradients[5][0], cotangents[1][0])
    assert not any(x[0].any() for x in gradients[:5])


def test_state_carries_over_any_split():
    length, size = 150, 48
    inputs, _ = case(length, "spread")
    q, k, v, g, beta, state = inputs
    whole, last = jax.jit(gated_delta_rule)(*inputs)

    step = jax.jit(
        lambda state, tokens: jax.lax.scan(
            lambda s, x: gated_delta_rule(*(a[:, None] for a in x), s)[::-1],
            state,
            [jnp.moveaxis(a, 1, 0) for a in tokens],
        )
    )
    stepped, out = step(state, inputs[:5])
    assert (
        rel_rms(jnp.moveaxis(out[:, :, 0], 0, 1), whole) <= TOLERANCE
        and rel_rms(stepped, last) <= TOLERANCE
    )

    run, outs, start = jax.jit(gated_delta_rule), [], 0
    for n in (48, 1, 17, 40, 44):  # each call of `size` rows, the rest of them pads
        rows = np.minimum(np.arange(start, start + size), length - 1)
        out, state = run(*(x[:, rows] for x in inputs[:5]), state, parity.padding([n], size))
        outs, start = [*outs, out[:, :n]], start + n
    assert (
        rel_rms(np.concatenate(outs, 1), whole) <= TOLERANCE and rel_rms(state, last) <= TOLERANCE
    )


@pytest.mark.parametrize("implementation", (xla, delta_hopper, delta_tpu))
def test_shapes_that_do_not_fit_are_told_by_all(implementation):
    wide, gates = jnp.zeros((1, 70, 2, 128), jnp.bfloat16), jnp.zeros((1, 70, 2))
    state = jnp.zeros((1, 2, 128, 128))
    right = {"q": wide, "k": wide, "v": wide, "g": gates, "beta": gates, "initial_state": state}
    wrong = {
        "q": wide[:, :, :1],
        "v": wide[:, :69],
        "g": gates[:, :, :1],
        "beta": gates[:, :, None],
        "initial_state": state[..., :64],
    }
    for name, x in wrong.items():
        with pytest.raises(ValueError, match=rf"{name} is \[.*\n  -> give it \[1, "):
            implementation.gated_delta_rule(**right | {name: x})


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 3, 8), (1, 4, 0, 8)])
def test_no_tokens_leave_the_state_alone(shape):
    x, gates = jnp.zeros(shape), jnp.zeros(shape[:3])
    out, state = gated_delta_rule(x, x, x, gates, gates)
    assert out.shape == shape and state.shape == (shape[0], shape[2], 8, 8) and not state.any()
    start = jnp.ones_like(state)
    np.testing.assert_array_equal(gated_delta_rule(x, x, x, gates, gates, start)[1], start)


def test_no_initial_state_is_zeros():
    inputs, _ = case(20)
    run = jax.jit(gated_delta_rule)
    for a, b in zip(run(*inputs[:5]), run(*inputs[:5], jnp.zeros_like(inputs[5])), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keys", ("random", "repeated"))
def test_bfloat16(keys):
    for gates in GATES:
        inputs, cotangents = case(500, gates, keys)
        narrow = [np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in inputs[:3]]
        got = chunked((*narrow, *inputs[3:]), cotangents)
        assert [x.dtype for x in got[0]] == [jnp.bfloat16, np.float32]
        assert [x.dtype for x in got[1]] == [jnp.bfloat16] * 3 + [np.float32] * 3
        rounded = np.asarray(jnp.asarray(cotangents[0], jnp.bfloat16).astype(jnp.float32))
        want = truth(
            (*(x.astype(np.float32) for x in narrow), *inputs[3:]), (rounded, cotangents[1])
        )
        assert_close(got, want, {name: min(ALLOWED[name], 1e-2) for name in NAMES})


def test_remat_policy_can_keep_the_sequential_parts():
    inputs, _ = case(130)

    def loops(policy):  # a scan forward or back, or the doublings of an inverse
        layer = jax.checkpoint(lambda *args: jnp.sin(gated_delta_rule(*args)[0]), policy=policy)
        gradient = jax.value_and_grad(lambda *args: layer(*args).sum(), argnums=range(6))
        return jax.jit(gradient).lower(*inputs).as_text("hlo").count(" while(")

    kept = jax.checkpoint_policies.save_only_these_names("gdn_inverse", "gdn_states")
    assert loops(jax.checkpoint_policies.nothing_saveable) == 5
    assert loops(kept) == 3


@pytest.mark.parametrize("implementation", (xla, delta_tpu, delta_hopper))
def test_what_the_backward_pass_keeps_grows_linearly(implementation):
    """No state for each token: of 32,768 numbers a head, what is kept for a token is less than one
    in twenty."""

    def kept(length):
        lead = 1, length, 2
        shapes = (
            [((*lead, 128), jnp.bfloat16)] * 2
            + [((*lead, 256), jnp.bfloat16)]
            + [(lead, jnp.float32)] * 2
        )
        inputs = [jax.ShapeDtypeStruct(*x) for x in shapes]
        pull = jax.eval_shape(lambda *x: jax.vjp(implementation.gated_delta_rule, *x)[1], *inputs)
        return sum(x.size for x in jax.tree.leaves(pull))

    short, long = kept(4096), kept(16384)
    assert long <= 4.1 * short
    assert long / 16384 / 2 <= 128 * 256 / 20


def test_memory_grows_linearly():
    def temporaries(length):
        inputs, cotangents = case(length, heads=1)
        run = jax.jit(lambda inputs, cts: jax.vjp(gated_delta_rule, *inputs)[1](cts))
        return run.lower(inputs, cotangents).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192) <= 4.1 * temporaries(2048)
