"""Inputs stay where earlier ones of their shapes were."""

import jax
import jax.numpy as jnp
import numpy as np

from infinitevl_jax.serve.staging import LARGEST, SHAPES, Staging


def test_values_change_and_places_stay():
    stage, places = Staging(), set()
    constant = np.arange(2000, dtype=np.int32)
    constant.setflags(write=False)
    writable = np.zeros(1500, np.float32)
    for turn in range(3):
        writable[:] = turn  # the same array with other content
        given = {"a": constant, "b": (writable, jnp.full(1024, turn, jnp.bfloat16), None)}
        staged = stage(given)
        jax.tree.map(np.testing.assert_array_equal, staged, given)
        leaves = jax.tree.leaves(staged)
        places.add(tuple(x.unsafe_buffer_pointer() for x in leaves))
        assert not given["b"][1].is_deleted()
    assert len(places) == 1
    # the second call copied all but the constant, and the third compiled nothing
    assert stage._copy._cache_size() == 2


def test_each_shape_has_arrays_of_its_own():
    stage = Staging()
    short, long = stage(np.zeros(3, np.int32)), stage(np.ones(5, np.int32))
    again = stage(np.full(3, 2, np.int32))
    assert short.is_deleted() and not long.is_deleted()
    np.testing.assert_array_equal(again, [2, 2, 2])
    np.testing.assert_array_equal(long, np.ones(5))


def test_it_holds_the_shapes_that_came_last_and_nothing_large():
    stage = Staging()
    first = stage(np.zeros(1, np.int32))
    for size in range(2, SHAPES + 2):
        stage(np.zeros(size, np.int32))
    assert stage(np.zeros(1, np.int32)) is not first and not first.is_deleted()  # made anew
    large = np.zeros(LARGEST + 1, np.uint8)
    assert stage(large) is large


def test_numbers_of_numpy_become_those_of_jax():
    staged = Staging()({"n": np.int32(7), "wide": np.arange(4)})  # int64 on the host
    assert staged["n"].shape == () and int(staged["n"]) == 7
    assert staged["wide"].dtype == jnp.int32
