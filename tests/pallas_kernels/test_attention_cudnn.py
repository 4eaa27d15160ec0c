"""The call of cuDNN, made without it: what is handed over and what comes back are the same (a GPU
runs it in the parity matrix)."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import Mask, reference, xla
from pallas_kernels.attention.implementations import ATTENTION
from pallas_kernels.dispatch import Dispatch
from pallas_kernels.hardware import ampere
from pallas_kernels.testing import cudnn_attention
from pallas_kernels.testing.cells import ALLOWED
from pallas_kernels.testing.parity import in_float64, padding, poison, rel_rms, with_gradients

CASES = {
    "window": (Mask(window=17, aligned=True), 0),
    "window longer than the row, pads": (Mask(window=500, aligned=True), 9),
    "no window": (Mask(aligned=True), 5),
    "both sides": (Mask(causal=False, aligned=True), 30),
}


@pytest.mark.parametrize("name", CASES)
def test_parity(name):
    mask, pads = CASES[name]
    rng, length = np.random.default_rng(0), 65
    shapes = [(2, length, heads, 80) for heads in (4, 2, 2, 4)] + [(2, length, 4)]
    rounded = [
        np.asarray(jnp.asarray(rng.standard_normal(s), jnp.bfloat16), np.float64) for s in shapes
    ]
    inputs, cotangents = tuple(rounded[:3]), tuple(rounded[3:])
    token_index = padding([length - pads, length], length)
    tokens = {
        "q_token_index": token_index,
        "k_token_index": token_index,
        "q_segment_ids": None,
        "k_segment_ids": None,
    }

    def gradients(attention):
        return with_gradients(lambda q, k, v, **t: attention(q, k, v, **t, mask=mask, scale=0.1))

    want = in_float64(gradients(reference.attention))(inputs, cotangents, tokens)
    poisoned = tuple(jnp.asarray(poison(x, token_index), jnp.bfloat16) for x in inputs)
    got = gradients(partial(cudnn_attention.attention, implementation="xla"))(
        poisoned, cotangents, tokens
    )
    for name, a, b in zip(
        ("out", "lse", "d_q", "d_k", "d_v"), (*got[0], *got[1]), (*want[0], *want[1]), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), err_msg=name)
        assert rel_rms(a[np.isfinite(b)], b[np.isfinite(b)]) <= ALLOWED[name], name


def test_lse_costs_nothing_where_nobody_uses_it():
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    rows = jnp.arange(256)[None]

    def flops(attention, results):
        run = jax.jit(
            lambda q: attention(
                q, q, q, rows, rows, None, None, Mask(window=100, aligned=True), 0.1
            )[:results]
        )
        return run.lower(x).compile().cost_analysis()["flops"]

    ours = partial(cudnn_attention.attention, implementation="xla")
    assert flops(ours, 2) - flops(ours, 1) > 0.5 * flops(xla.attention, 2)


def test_refusals_have_names():
    window = Mask(window=8, aligned=True)

    def reason(mask=window, segments=False, length=16, keys=16, width=128, dtype=jnp.bfloat16):
        q, k = (
            jax.ShapeDtypeStruct((1, length, 4, width), dtype),
            jax.ShapeDtypeStruct((1, keys, 2, width), dtype),
        )
        return cudnn_attention.supports(q, k, k, mask=mask, q_segment_ids=0 if segments else None)

    assert reason() is None and reason(width=80, dtype=jnp.float16) is None
    assert reason(Mask(window=8), keys=32) == "keys other than the queries' own"
    assert reason(segments=True) == "packed segments"
    assert reason(length=1, keys=1) == "a single query"
    assert reason(length=0, keys=0) == "no tokens"
    assert "sinks" in reason(Mask(window=8, sinks=1, aligned=True)) and "both sides" in reason(
        Mask(False, window=8, aligned=True)
    )
    assert "float32" in reason(dtype=jnp.float32)
    assert "84" in reason(width=84) and "256" in reason(width=256)
    with pytest.raises(ValueError, match="a single query\n  -> use the implementation xla"):
        x, rows = jnp.zeros((1, 1, 2, 64), jnp.bfloat16), jnp.zeros((1, 1), jnp.int32)
        cudnn_attention.attention(x, x, x, rows, rows, None, None, Mask(aligned=True), 1.0)


def test_it_runs_by_name_alone():
    gpu = SimpleNamespace(platform="gpu", device_kind="A100", compute_capability="8.0")
    x, rows = (
        jax.ShapeDtypeStruct((1, 8, 4, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, 8), jnp.int32),
    )
    case = x, x, x, rows, rows, None, None
    rule = {"mask": Mask(window=4, aligned=True), "scale": 0.1}
    with_cudnn = replace(
        ATTENTION, implementations=(*ATTENTION.implementations, cudnn_attention.CUDNN)
    )
    assert Dispatch(with_cudnn, gpu).choose(*case, **rule)[0].name == "xla"
    assert Dispatch(with_cudnn, gpu, "cudnn").choose(*case, **rule)[0].name == "cudnn"
    for capability, reason in (("10.3", None), ("7.5", "since Ampere"), ("gfx942", "since Ampere")):
        found = ampere(
            SimpleNamespace(platform="gpu", device_kind="it", compute_capability=capability)
        )
        assert (found is None) if reason is None else reason in found
    assert "cpu" in ampere(jax.devices("cpu")[0])
