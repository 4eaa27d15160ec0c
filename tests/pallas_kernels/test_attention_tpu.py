"""Attention for TPU in JAX's TPU interpreter: value and gradient against dense softmax in float64,
races and stray memory found.

Uninitialised memory reads as NaN, reads out of bounds raise, and pads hold NaN in every case.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import Case, truth, values_and_gradients

from pallas_kernels.attention import Mask
from pallas_kernels.attention.tpu import attention as attention_tpu
from pallas_kernels.attention.tpu.plan import (
    DIAGONAL,
    FIRST,
    FLAG_BITS,
    LAST,
    MASKED,
    WHOLE,
    reach,
    visits,
)
from pallas_kernels.testing.comparison import INTERPRETED
from pallas_kernels.testing.parity import poison, rel_rms

SMALL = attention_tpu.Block(128, 128, 2)  # so that these lengths take several steps
SMALL = attention_tpu.Tuning(SMALL, SMALL, SMALL)

CASES = {
    "one token": Case(1, Mask(aligned=True)),
    "window below": Case(63, Mask(window=17, aligned=True), heads=(2, 2), width=80),
    "window above": Case(300, Mask(window=1000, aligned=True), width=80, pads=3),
    "middling window": Case(290, Mask(window=140, aligned=True), heads=(4, 1), batch=2),
    "packed": Case(300, Mask(window=70, aligned=True), width=64, segments=(3, 150, 1, 130)),
    "packed sinks": Case(300, Mask(window=100, sinks=20, aligned=True), segments=(140, 1, 149)),
    "vision windows": Case(
        300, Mask(False, window=64, aligned=True), (3, 3), 80, segments=(64, 64, 32, 16, 64, 50)
    ),
    "vision full": Case(257, Mask(causal=False), heads=(2, 2), width=80, segments=(130, 100)),
    "window both ways": Case(300, Mask(causal=False, window=100, sinks=5), pads=30),
    "cached": Case(65, Mask(window=150), width=128, cached=235, pads=4),
    "cached sinks": Case(63, Mask(window=90, sinks=20), cached=230, batch=2),
    "all pads": Case(63, Mask(window=20, aligned=True), pads=63),
}


def compare(case, dtype, out_tolerance, gradient_tolerance):
    """Pads poisoned for us, not for the reference, on the same rounded numbers."""
    rounded = [np.asarray(jnp.asarray(x, dtype).astype(jnp.float32)) for x in case.tensors()]
    queries, keys = case.tokens()["q_token_index"], case.tokens()["k_token_index"]
    dirty = [
        jnp.asarray(poison(x, token_index), dtype)
        for x, token_index in zip(rounded[:3], (queries, keys, keys), strict=True)
    ]
    dirty += [jnp.asarray(poison(x, queries), jnp.float32) for x in rounded[3:]]
    ours = values_and_gradients(
        partial(attention_tpu.attention, interpret=INTERPRETED, tuning=SMALL), case, dirty
    )
    assert [x.dtype for x in ours] == [dtype, jnp.float32] + [dtype] * 3
    for name, a, b in zip(
        ["out", "lse", "d_q", "d_k", "d_v"], ours, truth(case, rounded), strict=True
    ):
        a = a.astype(np.float64)
        assert not np.isnan(a).any(), name
        np.testing.assert_array_equal(np.isinf(a), np.isinf(b), err_msg=name)
        real = np.isfinite(b)
        error = rel_rms(a[real], b[real])
        assert error <= (gradient_tolerance if name.startswith("d_") else out_tolerance), (
            name,
            error,
        )


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    compare(CASES[name], jnp.float32, 1e-5, 1e-5)


@pytest.mark.parametrize("name", ["middling window", "vision windows", "cached"])
def test_bfloat16(name):
    compare(CASES[name], jnp.bfloat16, 5e-3, 8e-3)


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_visits_are_the_mask(name, by_key):
    case, rows, keys = CASES[name], 32, 64
    tokens, mask = case.tokens(), case.mask
    block, k = (
        attention_tpu.Block(rows, keys, 1),
        np.zeros((case.batch, tokens["k_token_index"].shape[1], 1, 1)),
    )

    @jax.jit
    def make(tokens):
        who, _ = attention_tpu.kernel_call(
            k, k, reach(**tokens, mask=mask), block, attention_tpu.Static(mask, 1.0, None, SMALL)
        )
        return who, visits(who, mask, rows, keys, by_key)

    who, visited = make(tokens)
    outer, inner = (np.asarray(x)[: visited.count] for x in (visited.outer, visited.inner))
    assert visited.count <= len(visited.outer)

    far, near = who.low.shape[1] - case.length, who.number.shape[1] - k.shape[1]
    seen = np.asarray(mask.visible(*tokens.values()))
    seen = np.pad(seen, ((0, 0), (0, far), (0, near)))
    alive = np.pad(np.asarray(tokens["q_token_index"]) >= 0, ((0, 0), (0, far)))[:, :, None]
    tiles = [
        x.reshape(case.batch, -1, rows, seen.shape[2] // keys, keys) for x in (seen, seen | ~alive)
    ]
    some, every = tiles[0].any(axis=(2, 4)), tiles[1].all(axis=(2, 4))
    kinds = np.zeros(some.shape, int)
    flags = outer & ((1 << FLAG_BITS) - 1)
    i, j = (inner, outer >> FLAG_BITS) if by_key else (outer >> FLAG_BITS, inner)
    b, i, j = i // some.shape[1], i % some.shape[1], j % some.shape[2]
    assert len(set(zip(b, i, j, strict=True))) == len(b)
    kinds[b, i, j] = flags & (MASKED | DIAGONAL | WHOLE)
    assert (kinds[some] > 0).all() and every[kinds == WHOLE].all()
    blocks = np.split(outer >> FLAG_BITS, np.flatnonzero(np.diff(outer >> FLAG_BITS)) + 1)
    # Each, in one stretch.
    assert [x[0] for x in blocks] == list(range(case.batch * some.shape[2 if by_key else 1]))
    ends = np.cumsum([len(x) for x in blocks])
    np.testing.assert_array_equal(np.flatnonzero(flags & LAST), ends - 1)
    np.testing.assert_array_equal(np.flatnonzero(flags & FIRST), ends - [len(x) for x in blocks])


def test_visits_are_few():
    """Nothing but the diagonal and what the window, the segments and the filled part of a ring
    leave."""
    token_index = np.arange(8192, dtype=np.int32)[None]

    @partial(jax.jit, static_argnums=(0, 3, 4))
    def count(mask, segment_ids=None, k_token_index=token_index, rows=512, keys=1024):
        return visits(
            reach(token_index, k_token_index, segment_ids, segment_ids, mask), mask, rows, keys
        ).count

    assert count(Mask(window=8192, aligned=True)) == 72
    assert count(Mask(window=1024, aligned=True)) == 2 * (1 + 2 * 7)
    assert count(Mask(window=8192, aligned=True), token_index // 1024) == 16
    assert (
        count(Mask(False, window=64, aligned=True), token_index // 64, token_index, 128, 128) == 64
    )
    assert count(Mask(window=8192), None, np.where(token_index < 2048, token_index, -1)) == 2 * (
        1 + 2 * 7
    )
    assert count(Mask(window=1024), token_index // 1024) == 16
    assert count(Mask(), None, np.full_like(token_index, -1)) == 16


def test_in_parts_inside_shard_map():
    case = Case(130, Mask(window=100, aligned=True), pads=7, batch=2)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(*arrays, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale):
        local = partial(_plain, mask=mask, scale=scale)
        P = jax.sharding.PartitionSpec
        # The interpreter cannot say how its values vary over the mesh; compiled kernels do.
        split = jax.shard_map(
            local, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
        )
        return split(*arrays, q_token_index, k_token_index)

    ours = values_and_gradients(spread, case)
    for a, b in zip(ours, truth(case), strict=True):
        assert rel_rms(a[np.isfinite(b)], b[np.isfinite(b)]) <= 1e-5


def _plain(q, k, v, q_token_index, k_token_index, mask, scale):
    return attention_tpu.attention(
        q,
        k,
        v,
        q_token_index,
        k_token_index,
        None,
        None,
        mask,
        scale,
        interpret=INTERPRETED,
        tuning=SMALL,
    )


def test_refuses_by_name():
    shapes = {"q": (1, 64, 4, 128), "k": (1, 64, 2, 128), "v": (1, 64, 2, 128)}
    mask = Mask(window=8, aligned=True)

    def reason(mask=mask, dtype=jnp.bfloat16, **changed):
        arrays = {
            name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in (shapes | changed).items()
        }
        return attention_tpu.supports(**arrays, mask=mask, scale=1.0)

    assert reason() is None
    assert reason(dtype=jnp.float32) is None
    assert reason(dataclasses.replace(mask, sinks=3)) is None
    assert reason(Mask(), k=(1, 900, 2, 128), v=(1, 900, 2, 128)) is None
    assert "float16" in reason(dtype=jnp.float16)
    assert "256" in reason(v=(1, 64, 2, 256))
    assert "no tokens" in reason(Mask(), k=(1, 0, 2, 128), v=(1, 0, 2, 128))
    million = {name: (1, 1 << 20, 2, 128) for name in shapes}
    assert "pairs" in reason(Mask(aligned=True), **million)
    assert reason(Mask(window=8192, aligned=True), **million) is None
    q, token_index = jnp.zeros((1, 64, 4, 200)), jnp.arange(64)[None]
    with pytest.raises(ValueError, match="use the implementation xla"):
        attention_tpu.attention(q, q, q, token_index, token_index, None, None, mask, 1.0)
