"""Where sequences stand in rows, and the shapes of packed rows."""

import jax
import numpy as np
import pytest
from tiny import conversation, hybrid_config

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.inputs.batch import TokenSequence, join_sequences
from infinitevl_jax.inputs.model_inputs import build_inputs, packed_shapes
from infinitevl_jax.inputs.packing import Packing


def test_a_sequence_goes_into_the_first_row_that_has_room():
    packing = Packing(2, 10, patches=8)
    sizes = [(6, 4), (5, 0), (4, 0), (1, 4), (4, 4), (1, 1)]
    assert [packing.add(*size) for size in sizes] == [True, True, True, True, True, False]
    assert packing.places == [(0, 0, 6), (1, 0, 5), (0, 6, 10), (1, 5, 6), (1, 6, 10)]


def test_values_are_laid_out_at_the_places():
    packing = Packing(2, 4)
    assert all(packing.add(size) for size in (3, 2, 1))
    values = [np.array([1, 2, 3]), np.array([4, 5]), np.array([6])]
    assert packing.lay_out(values, fill=-1).tolist() == [[1, 2, 3, 6], [4, 5, -1, -1]]
    three = packing.lay_out([np.stack([v, 10 * v, 100 * v]) for v in values], dtype=np.float32)
    assert three.shape == (3, 2, 4) and three.dtype == np.float32
    assert three[1].tolist() == [[10, 20, 30, 60], [40, 50, 0, 0]]


def test_one_a_row_takes_nothing_else():
    packing = Packing.one_per_row([3, 1], 4, rows=3)
    assert packing.places == [(0, 0, 3), (1, 0, 1)] and not packing.add(1)
    assert packing.lay_out([np.ones(3), np.ones(1)]).sum(1).tolist() == [3, 1, 0]


def test_packed_rows():
    """Token index, segment ids and positions of texts beside each other."""
    packing = Packing(2, 8)
    texts = [np.arange(1, 6), np.arange(11, 14), np.array([21, 22])]
    assert all(packing.add(len(text)) for text in texts)
    batch = join_sequences([TokenSequence(text) for text in texts])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [11, 12, 13, 0, 0], [21, 22, 0, 0, 0]]
    inputs = build_inputs(hybrid_config(), **batch, packing=packing)
    decoder, counted = inputs.decoder, [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, -1, -1, -1, -1, -1, -1]]
    assert decoder.tokens.tolist() == [[1, 2, 3, 4, 5, 11, 12, 13], [21, 22, 0, 0, 0, 0, 0, 0]]
    assert decoder.token_index.tolist() == counted
    assert decoder.segment_ids.tolist() == [[0] * 5 + [1] * 3, [0] * 8]
    for axis in decoder.positions:
        np.testing.assert_array_equal(axis, np.maximum(counted, 0))
    assert inputs.counts.tolist() == [8, 2] and inputs.patches is None
    assert decoder.vision_index is None


def test_packed_rows_have_the_shapes_that_are_compiled_ahead():
    config = hybrid_config()
    batch = conversation(config)
    for patches in (132, 200, 0):
        packing = Packing(3, 100, patches)
        if patches:
            assert packing.add(batch["input_ids"].shape[1], 132)
            inputs = build_inputs(config, **batch, packing=packing)
        else:
            assert packing.add(2)
            inputs = build_inputs(config, [[1, 2]], packing=packing)
        built, expected = (inputs.decoder, inputs.patches), packed_shapes(config, packing)
        assert jax.tree.structure(built) == jax.tree.structure(expected)  # slice_reach, too
        for a, b in zip(jax.tree.leaves(built), jax.tree.leaves(expected), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert (expected[1] is None) == (patches == 0)


def test_rows_that_hold_no_image_have_the_shape_of_those_that_do():
    config, packing = hybrid_config(), Packing(1, 8, patches=64)
    assert packing.add(3)
    inputs = build_inputs(config, [[1, 2, 3]], packing=packing)
    assert inputs.patches.pixels.shape == (1, 64, config.vision.patch_features)
    assert (inputs.patches.patch_index == -1).all() and (inputs.decoder.vision_index == -1).all()


def test_more_patches_than_a_row_holds_are_refused():
    config = hybrid_config()
    batch = conversation(config)
    packing = Packing.one_per_row([batch["input_ids"].shape[1]], 100, patches=128)
    with pytest.raises(InfiniteVLError, match="have 132 patches, a packed row holds 128"):
        build_inputs(config, **batch, packing=packing)
