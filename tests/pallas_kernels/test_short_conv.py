"""The causal convolution against the float64 definition: values, gradients, packing, pads and
tails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.short_conv import reference, short_conv
from pallas_kernels.testing import parity
from pallas_kernels.testing.parity import poison, rel_rms

TOLERANCE = 1e-6
ours = parity.with_gradients(short_conv)
truth = parity.in_float64(parity.with_gradients(reference.short_conv))


def case(length, batch=2, channels=5, seed=0):
    """(x, weight, tail) and the cotangents of (out, tail), float32."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, length, channels),
        (4, channels),
        (batch, 3, channels),
        (batch, length, channels),
        (batch, 3, channels),
    )
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return tuple(arrays[:3]), tuple(arrays[3:])


def assert_close(got, want, tolerance=TOLERANCE):
    names = ("out", "tail", "gradient of x", "gradient of weight", "gradient of tail")
    errors = {
        name: rel_rms(a, b)
        for name, a, b in zip(names, (*got[0], *got[1]), (*want[0], *want[1]), strict=True)
    }
    assert all(error <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize("length", (1, 2, 3, 4, 65))
def test_equals_float64_definition(length):
    inputs, cotangents = case(length)
    assert_close(ours(inputs, cotangents), truth(inputs, cotangents))


def test_identity_tap_and_order_of_taps():
    x = np.float32([1, 2, 3, 4, 5])[None, :, None]
    for tap, want in ((3, [1, 2, 3, 4, 5]), (0, [0, 0, 0, 1, 2])):
        weight = np.zeros((4, 1), np.float32)
        weight[tap] = 1
        out, conv_state = short_conv(x, weight)
        np.testing.assert_allclose(out[0, :, 0], jax.nn.silu(jnp.float32(want)), rtol=1e-6)
        np.testing.assert_array_equal(conv_state[0, :, 0], [3, 4, 5])


@pytest.mark.parametrize("pieces", [(9,), (5, 1, 2, 7, 3), (2, 6, 1), (1, 1, 1)])
def test_packed_rows(pieces):
    length = 20
    token_index, segment_ids = parity.packing(pieces, length)
    inputs, cotangents = case(length, batch=1)
    others = {"token_index": token_index, "segment_ids": segment_ids}
    got = ours(inputs, cotangents, others)
    assert_close(got, truth(inputs, cotangents, others))

    start = 0
    for number, n in enumerate(pieces):  # each sequence alone
        conv_state = inputs[2] if number == 0 else None
        out, conv_state = jax.jit(short_conv)(
            inputs[0][:, start : start + n], inputs[1], conv_state
        )
        assert rel_rms(got[0][0][:, start : start + n], out) <= TOLERANCE
        start += n
    np.testing.assert_array_equal(got[0][1], conv_state)


def test_packed_without_index_and_returning_segments():
    inputs, cotangents = case(12)
    segment_ids = np.int32([[0, 0, 0, 1, 0, 0, 0, 2, 2, 2, 2, 3], [5] * 12])
    assert_close(
        ours(inputs, cotangents, {"segment_ids": segment_ids}),
        truth(inputs, cotangents, {"segment_ids": segment_ids}),
    )


def test_pads_between_sequences():
    inputs, cotangents = case(16)
    token_index = np.int32([[0, 1, 2, 3, 4, -1, -1, 0, 1, -1, 0, 1, 2, 3, -1, -1], [0] + [-1] * 15])
    segment_ids = np.int32([[0] * 7 + [1] * 3 + [2] * 6, [0] * 16])
    others = {"token_index": token_index, "segment_ids": segment_ids}
    assert_close(ours(inputs, cotangents, others), truth(inputs, cotangents, others))


def test_poisoned_pads_reach_nothing():
    inputs, cotangents = case(9, batch=4)
    token_index = parity.padding([9, 4, 1, 0], 9)
    (x, weight, conv_state), (ct_out, ct_tail) = inputs, cotangents
    got = ours(inputs, cotangents, {"token_index": token_index})
    assert_close(got, truth(inputs, cotangents, {"token_index": token_index}))
    ruined = ours(
        (poison(x, token_index), weight, conv_state),
        (poison(ct_out, token_index), ct_tail),
        {"token_index": token_index},
    )
    for a, b in zip(jax.tree.leaves(ruined), jax.tree.leaves(got), strict=True):
        np.testing.assert_array_equal(a, b)
    (out, new_conv_state), (ct_x, _, ct_old) = got
    assert new_conv_state[3].tobytes() == conv_state[3].tobytes()
    np.testing.assert_array_equal(ct_old[3], ct_tail[3])
    assert not out[token_index < 0].any() and not ct_x[token_index < 0].any()


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_tail_carries_over_any_split(dtype):
    rng = np.random.default_rng(3)
    (x, weight, conv_state), _ = case(40, channels=3)
    x, weight, conv_state = (jnp.asarray(a, dtype) for a in (x, weight, conv_state))
    whole, last = jax.jit(short_conv)(x, weight, conv_state)
    run = jax.jit(short_conv)
    for _ in range(3):
        state, start, outs = conv_state, 0, []
        for n in parity.lengths(rng, 40, 9):
            rows = jnp.minimum(jnp.arange(start, start + 32), 39)
            out, state = run(x[:, rows], weight, state, jnp.asarray(parity.padding([n, n], 32)))
            outs, start = [*outs, out[:, :n]], start + n
        assert out.dtype == state.dtype == dtype
        np.testing.assert_array_equal(jnp.concatenate(outs, 1), whole)
        np.testing.assert_array_equal(state, last)


def test_packed_row_split_inside_and_between_sequences():
    (x, weight, conv_state), _ = case(24, batch=1)
    _, segment_ids = parity.packing((2, 9, 1, 12), 24)
    run = jax.jit(short_conv)
    token_index = np.zeros((1, 24), np.int32)
    whole, last = run(x, weight, conv_state, token_index, segment_ids)
    for cut in range(1, 24):
        first, middle = run(
            x, weight, conv_state, np.where(np.arange(24) < cut, token_index, -1), segment_ids
        )
        if segment_ids[0, cut] != segment_ids[0, cut - 1]:
            middle = np.zeros_like(middle)
        rest = [
            np.roll(a, -cut, axis=1)
            for a in (x, np.where(np.arange(24) < cut, -1, token_index), segment_ids)
        ]
        second, end = run(rest[0], weight, middle, *rest[1:])
        np.testing.assert_array_equal(
            np.concatenate([first[:, :cut], second[:, : 24 - cut]], 1), whole
        )
        np.testing.assert_array_equal(end, last)


def test_bfloat16():
    inputs, cotangents = case(50)
    narrow = [np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in (*inputs, *cotangents)]
    got = ours(narrow[:3], narrow[3:])
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    wide = [x.astype(np.float32) for x in narrow]
    assert_close(got, truth(wide[:3], wide[3:]), 4e-3)
