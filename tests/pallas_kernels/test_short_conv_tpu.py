"""The TPU kernels of the causal convolution, interpreted, against the float64 definition: values
and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_short_conv import assert_close, case, truth

from pallas_kernels.short_conv.tpu import short_conv as short_conv_tpu
from pallas_kernels.short_conv.tuning import TPU as TPUShortConv
from pallas_kernels.testing import parity
from pallas_kernels.testing.comparison import INTERPRETED
from pallas_kernels.testing.parity import poison

ours = parity.with_gradients(partial(short_conv_tpu.short_conv, interpret=INTERPRETED))


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    monkeypatch.setattr(TPUShortConv, "rows", 128)
    monkeypatch.setattr(TPUShortConv, "lanes", 256)


@pytest.mark.parametrize(("length", "channels"), [(16, 128), (100, 384), (128, 256), (300, 512)])
def test_equals_float64_definition(length, channels):
    inputs, cotangents = case(length, channels=channels)
    assert_close(ours(inputs, cotangents), truth(inputs, cotangents))


@pytest.mark.parametrize("pieces", [(126, 1, 2, 130), (128, 40, 3), (1, 1, 1, 250)])
def test_packed_rows_with_poisoned_pads(pieces):
    length = 270
    token_index, segment_ids = parity.packing(pieces, length)
    inputs, cotangents = case(length, batch=1, channels=128)
    others = {"token_index": token_index, "segment_ids": segment_ids}
    dirty = [
        (poison(inputs[0], token_index), *inputs[1:]),
        (poison(cotangents[0], token_index), cotangents[1]),
    ]
    assert_close(ours(*dirty, others), truth(inputs, cotangents, others))


def test_rows_of_their_own_lengths():
    inputs, cotangents = case(140, batch=4, channels=128)
    token_index = parity.padding([140, 128, 1, 0], 140)
    others = {"token_index": token_index}
    got = ours((poison(inputs[0], token_index), *inputs[1:]), cotangents, others)
    assert_close(got, truth(inputs, cotangents, others))
    assert got[0][1][3].tobytes() == inputs[2][3].tobytes()  # the tail of a row of pads
    assert not got[0][0][token_index < 0].any() and not got[1][0][token_index < 0].any()


def test_bfloat16():
    inputs, cotangents = case(150, channels=256)
    narrow = [np.asarray(jnp.asarray(x, jnp.bfloat16)) for x in (*inputs, *cotangents)]
    got = ours(narrow[:3], narrow[3:])
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    wide = [x.astype(np.float32) for x in narrow]
    assert_close(got, truth(wide[:3], wide[3:]), 4e-3)


def test_refuses_by_name():
    def reason(*shape, dtype=jnp.bfloat16):
        return short_conv_tpu.supports(jax.ShapeDtypeStruct(shape, dtype), None)

    assert reason(1, 16, 128) is None
    assert "130 channels" in reason(1, 16, 130)
    assert "rows of 1 tokens" in reason(1, 1, 128)
    assert "float16" in reason(1, 16, 128, dtype=jnp.float16)
    with pytest.raises(ValueError, match="use the implementation xla"):
        short_conv_tpu.short_conv(jnp.zeros((1, 1, 128)), jnp.zeros((4, 128)))
