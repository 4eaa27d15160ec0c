"""Heads divided by their lengths, by groups and by products: against float64, value and gradient,
and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.sharding import make_mesh, operator_mesh
from pallas_kernels.l2norm import products
from pallas_kernels.l2norm.partition import partition_l2norm
from pallas_kernels.l2norm.xla import l2norm
from pallas_kernels.testing.parity import in_float64, rel_rms, with_gradients

HEADS, WIDTH, EPS = 6, 24, 1e-6


def drawn(dtype):
    """Heads of very different lengths, one of them zero, and a cotangent."""
    rng = np.random.default_rng(0)
    x, ct = rng.standard_normal((2, 4, 5, HEADS, WIDTH))
    x *= np.exp(rng.normal(0, 3, (4, 5, HEADS, 1)))
    x[0, 0, 0] = 0
    x, ct = (np.asarray(jnp.asarray(y.reshape(4, 5, -1), dtype)) for y in (x, ct))
    return x, np.asarray(ct, np.float32)


def results(function, x, ct):
    got = with_gradients(lambda x: (function(x, HEADS, EPS),))((x,), (ct,), {})
    return [np.asarray(y, np.float64) for y in jax.tree.leaves(got)]


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("function", (l2norm, products.l2norm))
def test_matches_float64(function, dtype):
    x, ct = drawn(dtype)
    exact = in_float64(with_gradients(lambda x: (by_definition(x),)))(
        (x.astype(np.float64),), (ct.astype(np.float64),), {}
    )
    (out, d_x), (want, want_d_x) = results(function, x, ct), jax.tree.leaves(exact)
    assert function(x, HEADS, EPS).dtype == jnp.float32
    assert rel_rms(out, want) <= 1e-6
    # The gradient of x is rounded to bfloat16.
    assert rel_rms(d_x, want_d_x) <= (1e-5 if dtype == jnp.float32 else 4e-3)
    assert not out[0, 0, :WIDTH].any()


def by_definition(x):
    heads = [x[..., WIDTH * h : WIDTH * (h + 1)] for h in range(HEADS)]
    return jnp.concatenate(
        [y / jnp.sqrt(jnp.sum(y**2, axis=-1, keepdims=True) + EPS) for y in heads], axis=-1
    )


@pytest.mark.parametrize(
    "run",
    (RunConfig(data=2, fsdp=2, tensor=2), RunConfig(fsdp=2, tensor=4)),
    ids=("heads split", "heads whole"),
)
def test_on_a_mesh_each_device_has_its_own_heads(run):
    x, ct = drawn(jnp.float32)
    for function in (l2norm, products.l2norm):
        spread = partition_l2norm(function, operator_mesh(make_mesh(run)))
        for a, b in zip(results(spread, x, ct), results(function, x, ct), strict=True):
            assert rel_rms(a, b) <= 1e-6
        text = jax.jit(spread, static_argnums=(1, 2)).lower(x, HEADS, EPS).compile().as_text()
        assert "all-reduce" not in text
