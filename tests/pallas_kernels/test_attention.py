"""Every implementation of `attend` against dense softmax in float64: value and gradient, of out and
of lse."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import Mask, attention, merge, reference, xla, xla_blocks
from pallas_kernels.attention.hopper import attention as attention_hopper
from pallas_kernels.attention.tpu import attention as attention_tpu
from pallas_kernels.attention.tpu.plan import reach
from pallas_kernels.attention.tuning import XLA as XLAAttention
from pallas_kernels.attention.visible_ranges import visible_ranges
from pallas_kernels.testing import cudnn_attention
from pallas_kernels.testing.parity import in_float64, poison, rel_rms, with_gradients

TOLERANCE = 1e-5  # relative RMS error of float32 against float64


@dataclasses.dataclass(frozen=True)
class Case:
    """Random tensors and the order of their tokens. cached: keys of an earlier call, in ring order,
    before the new."""

    length: int
    mask: Mask
    heads: tuple[int, int] = (4, 2)
    width: int = 16
    segments: tuple[int, ...] = ()  # lengths; what is left of the row is pads
    pads: int = 0
    cached: int = 0
    batch: int = 1

    @property
    def scale(self):
        return self.width**-0.5

    def tokens(self):
        """q_token_index, k_token_index, q_segment_ids and k_segment_ids, [B, T] each or None."""
        if self.segments:
            token_index = np.concatenate([np.arange(n) for n in self.segments])
            segment_ids = np.repeat(np.arange(len(self.segments)), self.segments)
            left = self.length - len(token_index)
            token_index, segment_ids = (
                np.pad(token_index, (0, left), constant_values=-1),
                np.pad(segment_ids, (0, left)),
            )
        else:
            token_index, segment_ids = np.arange(self.length) + self.cached, None
            token_index = np.where(
                np.arange(self.length) < self.length - self.pads, token_index, -1
            )
        k_token_index, k_segment_ids = token_index, segment_ids
        if self.cached:
            old = np.random.default_rng(1).permutation(self.cached)
            old[old % 7 == 3] = -1  # slots not yet filled
            k_token_index = np.concatenate([old, token_index])
        rows = {
            "q_token_index": token_index,
            "k_token_index": k_token_index,
            "q_segment_ids": segment_ids,
            "k_segment_ids": k_segment_ids,
        }
        return {
            name: None if x is None else np.tile(x.astype(np.int32), (self.batch, 1))
            for name, x in rows.items()
        }

    def tensors(self):
        """q, k, v and the cotangents of out and lse."""
        draw = np.random.default_rng(0).normal
        (hq, hkv), keys = self.heads, self.length + self.cached
        q, out = (draw(size=(self.batch, self.length, hq, self.width)) for _ in range(2))
        k, v = (draw(size=(self.batch, keys, hkv, self.width)) for _ in range(2))
        return q, k, v, out, draw(size=(self.batch, self.length, hq))


def values_and_gradients(function, case, tensors=None, run=lambda call: call):
    """out, lse and the gradients of q, k and v."""
    *qkv, d_out, d_lse = tensors or case.tensors()
    call = run(with_gradients(functools.partial(function, mask=case.mask, scale=case.scale)))
    outputs, gradients = call(qkv, (d_out, d_lse), case.tokens())
    return *outputs, *gradients


def truth(case, tensors=None):
    return values_and_gradients(reference.attention, case, tensors, in_float64)


def assert_same(ours, theirs, tolerance):
    for name, a, b in zip(["out", "lse", "d_q", "d_k", "d_v"], ours, theirs, strict=True):
        assert not np.isnan(a.astype(np.float64)).any(), name
        np.testing.assert_array_equal(np.isinf(a), np.isinf(b), err_msg=name)
        real = np.isfinite(b)
        assert rel_rms(a[real], b[real]) <= tolerance, (name, rel_rms(a[real], b[real]))


CASES = {
    "one token": Case(1, Mask(aligned=True)),
    "window below": Case(63, Mask(window=17, aligned=True), heads=(2, 2), width=80),
    "window equal": Case(65, Mask(window=65, aligned=True), pads=3),
    "window above": Case(300, Mask(window=1000, aligned=True), width=80),
    "full": Case(1000, Mask(aligned=True), pads=11),
    "middling window": Case(1000, Mask(window=300, aligned=True)),
    "sinks": Case(1000, Mask(window=280, sinks=40, aligned=True), pads=70),
    "packed sinks": Case(1000, Mask(window=280, sinks=40, aligned=True), segments=(400, 1, 590)),
    "band, packed": Case(
        300, Mask(window=64, aligned=True), width=80, segments=(100, 180), batch=2
    ),
    "band, many steps": Case(1000, Mask(window=200, aligned=True), heads=(2, 1), pads=5),
    "vision windows": Case(
        1000,
        Mask(False, window=64, aligned=True),
        heads=(2, 2),
        width=80,
        segments=(64, 64, 32, 16) * 5,
    ),
    "vision full": Case(300, Mask(causal=False), heads=(2, 2), width=80, segments=(150, 100)),
    "window both ways": Case(1000, Mask(causal=False, window=300, sinks=5, aligned=True), pads=30),
    "cached": Case(65, Mask(window=150), cached=300, pads=4),
    "cached sinks": Case(63, Mask(window=90, sinks=20), cached=300, batch=2),
    "all pads": Case(63, Mask(window=20, aligned=True), pads=63),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_float64(case, monkeypatch):
    # Blocks small enough that these lengths take several steps.
    monkeypatch.setattr(XLAAttention, "side", 192)
    monkeypatch.setattr(XLAAttention, "area", 192 * 256)
    monkeypatch.setattr(XLAAttention, "band_area", 64 * 192 * 3)
    assert_same(values_and_gradients(attention, case), truth(case), TOLERANCE)


def test_matches_float64_in_one_step():
    case = Case(250, Mask(window=200, sinks=9, aligned=True), pads=9)
    assert len(xla_blocks.plan(250, 250, case.mask, False).starts) == 1
    assert_same(values_and_gradients(attention, case), truth(case), TOLERANCE)


def test_reference_and_mask_by_hand():
    mask = Mask(window=3, sinks=1)
    case = Case(11, mask, heads=(2, 1), segments=(3, 7))
    q, k, v, *_ = case.tensors()
    token_index, segment_ids = case.tokens()["q_token_index"][0], case.tokens()["q_segment_ids"][0]
    out, lse, *_ = truth(case)
    for t, h in np.ndindex(11, 2):
        seen = [
            s
            for s in range(11)
            if token_index[t] >= 0 and token_index[s] >= 0 and segment_ids[t] == segment_ids[s]
            if token_index[s] <= token_index[t]
            and (token_index[t] - token_index[s] < 3 or token_index[s] < 1)
        ]
        weights = np.exp([case.scale * q[0, t, h] @ k[0, s, 0] for s in seen])
        values = sum((w * v[0, s, 0] for w, s in zip(weights, seen, strict=True)), np.zeros(16))
        np.testing.assert_allclose(out[0, t, h], values / max(weights.sum(), 1e-300), atol=1e-12)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(lse[0, t, h], np.log(weights.sum()), atol=1e-12)


@pytest.mark.parametrize("length", [1, 300, 2500, 5000])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "window, sinks", [(None, 0), (64, 0), (65, 0), (256, 0), (256, 9), (700, 0), (3000, 300)]
)
def test_plan_covers_each_pair_once(length, causal, window, sinks):
    mask = Mask(causal, window, sinks, aligned=True)
    steps = xla_blocks.plan(length, length, mask, packed=False)
    met = np.zeros((steps.q_total, steps.k_total), np.int8)
    for q, k in steps.starts:
        assert q + steps.q_rows <= steps.q_total and k + steps.k_rows <= steps.k_total
        for block in range(0, steps.q_rows, steps.q_block):
            met[q + block : q + block + steps.q_block, k + block : k + block + steps.reach] += 1
    met = met[:length, steps.k_front :][:, :length]
    row = np.arange(length)
    far = row[:, None] - row if causal else np.abs(row[:, None] - row)
    seen = (row <= row[:, None]) if causal else np.ones((length, length), bool)
    seen &= (far < (window or length)) | (row < sinks)
    assert met.max() == 1 and met[seen].all()
    if window == 64:
        assert met.sum() <= length * (192 if not causal else 128)
    if length == 5000 and window is None and causal:
        assert met.sum() <= 0.61 * length**2


def test_cached_and_new_merge_to_one_call():
    case = Case(64, Mask(window=150), cached=256, pads=5)
    cached = case.cached

    def in_two(q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale):
        old = attention(
            q,
            k[:, :cached],
            v[:, :cached],
            q_token_index,
            k_token_index[:, :cached],
            None,
            None,
            mask,
            scale,
        )
        aligned = dataclasses.replace(mask, aligned=True)
        new = attention(
            q,
            k[:, cached:],
            v[:, cached:],
            q_token_index,
            k_token_index[:, cached:],
            None,
            None,
            aligned,
            scale,
        )
        return merge(*old, *new)

    assert_same(values_and_gradients(in_two, case), truth(case), TOLERANCE)


def test_merge_with_empty_sides():
    draw = np.random.default_rng(0).normal
    full = (
        jnp.asarray(draw(size=(2, 3, 8)), jnp.float32),
        jnp.asarray(draw(size=(2, 3)), jnp.float32),
    )
    none = jnp.zeros_like(full[0]), jnp.full_like(full[1], -jnp.inf)

    @jax.jit
    def run(*args):
        outputs, pull = jax.vjp(merge, *args)
        return outputs, pull(jax.tree.map(jnp.ones_like, outputs))

    for a, b, union in [(full, none, full), (none, full, full), (none, none, none)]:
        outputs, gradients = run(*a, *b)
        np.testing.assert_array_equal(outputs[0], union[0])
        np.testing.assert_array_equal(outputs[1], union[1])
        for got, side in zip(gradients, (a, a, b, b), strict=True):
            np.testing.assert_array_equal(got, np.full(got.shape, float(side is full)))
    assert (
        jax.eval_shape(merge, full[0].astype(jnp.bfloat16), full[1], *none)[0].dtype == jnp.bfloat16
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(300, Mask(window=64, aligned=True), segments=(100, 150), batch=2),
        Case(100, Mask(window=64, sinks=3), cached=200, pads=30),
    ],
    ids=["band", "cached"],
)
def test_poisoned_pads(case, monkeypatch):
    monkeypatch.setattr(XLAAttention, "area", 128 * 128)
    clean = case.tensors()
    queries, keys = case.tokens()["q_token_index"], case.tokens()["k_token_index"]
    indices = (queries, keys, keys, queries, queries)
    dirty = [poison(x, token_index) for x, token_index in zip(clean, indices, strict=True)]
    clean, dirty = (values_and_gradients(attention, case, x) for x in (clean, dirty))
    for a, b in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(a, b)
    out, lse, d_q, d_k, d_v = dirty
    q_pad, k_pad = queries < 0, keys < 0
    assert q_pad.any() and k_pad.any()
    assert (out[q_pad] == 0).all() and (lse[q_pad] == -np.inf).all()
    assert (d_q[q_pad] == 0).all() and (d_k[k_pad] == 0).all() and (d_v[k_pad] == 0).all()


def test_bfloat16():
    case = Case(300, Mask(window=64, aligned=True), pads=20, width=80)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in case.tensors()]
    ours = values_and_gradients(attention, case, rounded)
    assert [x.dtype for x in ours] == [jnp.bfloat16, jnp.float32] + [jnp.bfloat16] * 3
    assert_same(ours, truth(case, rounded), 1e-2)


def program(case, gradients):
    def run(q, k, v, d_out, d_lse, tokens):
        op = partial(attention, **tokens, mask=case.mask, scale=case.scale)
        if not gradients:
            return op(q, k, v)
        return jax.vjp(op, q, k, v)[1]((d_out, d_lse))

    (hq, hkv), shape = case.heads, jax.ShapeDtypeStruct
    q, lse = (
        shape((1, case.length, hq, case.width), jnp.float32),
        shape((1, case.length, hq), jnp.float32),
    )
    k = shape((1, case.length + case.cached, hkv, case.width), jnp.float32)
    return jax.jit(run).lower(q, k, k, q, lse, case.tokens())


@pytest.mark.parametrize(
    "mask",
    [
        Mask(window=512, aligned=True),
        Mask(window=1024, sinks=256, aligned=True),
        Mask(causal=False, window=64, aligned=True),
    ],
    ids=["window", "sinks", "vision"],
)
def test_memory_grows_linearly(mask):
    short, long = 3072, 12288
    for gradients in (False, True):
        memory = [
            program(Case(length, mask), gradients).compile().memory_analysis().temp_size_in_bytes
            for length in (short, long)
        ]
        assert memory[1] <= 4.1 * memory[0]
        assert memory[1] < long * long  # not one byte a score


def test_decoding_is_one_dense_block():
    case = Case(1, Mask(window=8192), heads=(16, 2), width=128, cached=8191)
    assert "while" not in program(case, False).as_text()
    assert "while" in program(Case(4096, Mask(aligned=True)), False).as_text()


def test_inside_shard_map():
    case = Case(300, Mask(window=130, aligned=True), pads=10, batch=2)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(*arrays, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale):
        local = partial(attention, q_segment_ids=None, k_segment_ids=None, mask=mask, scale=scale)
        return jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(
            *arrays, q_token_index, k_token_index
        )

    ours, plain = (values_and_gradients(f, case) for f in (spread, attention))
    assert_same(ours, plain, 1e-6)


@pytest.mark.parametrize("implementation", (xla, attention_hopper, attention_tpu, cudnn_attention))
def test_what_does_not_fit_together_is_told_by_all(implementation):
    x, token_index = jnp.zeros((1, 4, 4, 128), jnp.bfloat16), jnp.arange(4, dtype=jnp.int32)[None]

    def run(k=x, v=x, q_segment_ids=None, k_segment_ids=None):
        k_token_index = jnp.zeros(k.shape[:2], jnp.int32)
        return implementation.attention(
            x,
            k,
            v,
            token_index,
            k_token_index,
            q_segment_ids,
            k_segment_ids,
            Mask(aligned=True),
            1.0,
        )

    with pytest.raises(
        ValueError,
        match="4 query heads, 3 key heads and 3 value heads\n  -> key and value heads must",
    ):
        run(x[:, :, :3], x[:, :, :3])
    with pytest.raises(ValueError, match="4 query heads, 2 key heads and 4 value heads"):
        run(x[:, :, :2])
    with pytest.raises(ValueError, match="0 key heads"):
        run(x[:, :, :0], x[:, :, :0])
    with pytest.raises(ValueError, match="queries 128 wide, keys 64"):
        run(x[..., :64])
    with pytest.raises(
        ValueError,
        match=r"k \[1, 4\] and v \[1, 3\]\n  -> one batch size, and a value for each key",
    ):
        run(v=x[:, :3])
    with pytest.raises(ValueError, match="one side only"):
        run(q_segment_ids=token_index)
    with pytest.raises(ValueError, match="one side only"):
        run(k_segment_ids=token_index)
    with pytest.raises(ValueError, match="4 queries and 2 keys\n  -> aligned=False"):
        run(x[:, :2], x[:, :2])


def test_masks_that_cannot_be():
    with pytest.raises(ValueError, match="window"):
        Mask(window=0)
    with pytest.raises(ValueError, match="sinks"):
        Mask(sinks=-1)


@pytest.mark.parametrize("causal", (True, False))
def test_the_widest_window_is_no_window(causal):
    case = Case(65, Mask(causal=causal, aligned=True), segments=(20, 40))
    tokens = [jnp.asarray(x) for x in case.tokens().values()]
    wide = dataclasses.replace(case.mask, window=2**31 - 1)
    for mine, plain in zip(
        visible_ranges(tokens[0], tokens[2], wide),
        visible_ranges(tokens[0], tokens[2], case.mask),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, plain)
    loose, wide = (dataclasses.replace(mask, aligned=False) for mask in (case.mask, wide))
    token_index = jnp.asarray([[0, 5, 2**30, 2**31 - 3]])
    low, high = (
        [np.asarray(x) for x in reach(token_index, token_index, None, None, mask)[:2]]
        for mask in (loose, wide)
    )
    np.testing.assert_array_equal(low[1], high[1])
    assert (high[0] <= np.maximum(token_index - (2**31 - 2), 0)).all()


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (1, 0, 2, 8), (1, 4, 0, 8)])
def test_nothing_gives_nothing(shape):
    x = jnp.zeros(shape)
    token_index = jnp.zeros(shape[:2], jnp.int32)
    keys = jnp.zeros((*shape[:2], max(1, shape[2]), 8))
    for mask in (Mask(aligned=True), Mask(window=3, aligned=True), Mask(causal=False)):
        rest = token_index, token_index, None, None, mask, 1.0
        (out, lse), pull = jax.vjp(
            lambda q, k, v, rest=rest: attention(q, k, v, *rest), x, keys, keys
        )
        assert out.shape == shape and lse.shape == shape[:3]
        assert [g.shape for g in pull((out, lse))] == [shape, keys.shape, keys.shape]


def test_no_keys_at_all():
    q, token_index = jnp.ones((1, 3, 2, 8)), jnp.arange(3, dtype=jnp.int32)[None]
    nothing = jnp.zeros((1, 0, 2, 8)), jnp.zeros((1, 0, 2, 8))
    out, lse = attention(q, *nothing, token_index, token_index[:, :0], None, None, Mask(), 1.0)
    assert (out == 0).all() and (lse == -jnp.inf).all()
