"""The backward pass for Hopper: its gate vectors, its formulas and how they are put together. The
kernels' own products run on a GPU only.

On a CPU the kernels are lowered, and dense products over the same chunks take their place.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gated_delta_rule import case

from pallas_kernels.gated_delta_rule import xla
from pallas_kernels.gated_delta_rule.hopper import backward as delta_backward
from pallas_kernels.gated_delta_rule.hopper.chunk_scan_backward import (
    BETA,
    CHUNK,
    ROWS,
    SEGMENT,
    SINCE,
    SUM,
    UNTIL,
)
from pallas_kernels.gated_delta_rule.hopper.gradients_memory import (
    D_BETA,
    D_BETA_TOO,
    D_GATE,
    PRODUCT,
    SUMS,
)
from pallas_kernels.segments import segment_numbers
from pallas_kernels.testing import parity
from pallas_kernels.testing.parity import GATES, rel_rms

CASES = {gates: (256, gates, "random", None) for gates in GATES}
CASES |= {f"{gates}, repeated keys": (256, gates, "repeated", None) for gates in GATES}
CASES |= {
    "packed": (320, "spread", "random", (37, 1, 64, 2, 70, 140)),
    "packed in whole chunks": (256, "mild", "random", (64, 192)),
}


def chunked(x):
    """[B, T, H, ...] -> [B, H, N, 64, ...]"""
    x = x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:])
    return jnp.moveaxis(x, 3, 1)


def joined(x):
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def decays(vectors):
    sums, run = vectors[..., SUM, :], vectors[..., SEGMENT, :]
    keep = jnp.tri(CHUNK, dtype=bool) & (run[..., :, None] == run[..., None, :])
    return jnp.exp(jnp.where(keep, sums[..., :, None] - sums[..., None, :], -jnp.inf))


def dense_chunk_scan_backward(q, k, d_out, inverse, vectors, d_ends):
    q, k, d_out = map(chunked, (q, k, d_out))
    since, beta, until = (vectors[..., i, :, None] for i in (SINCE, BETA, UNTIL))
    scores = q @ k.mT * decays(vectors)
    ds, xs, d_states = d_ends[:, :, 0], [], []
    for n in reversed(range(k.shape[2])):
        at = (slice(None), slice(None), n)
        d_states.insert(0, ds.mT)
        xs.insert(0, inverse[at].sum(2).mT @ (scores[at].mT @ d_out[at] + until[at] * (k[at] @ ds)))
        ds = (
            since[at][..., -1:, :] * ds
            + (since[at] * q[at]).mT @ d_out[at]
            - (beta[at] * since[at] * k[at]).mT @ xs[0]
        )
    return jnp.stack(xs, 2), jnp.stack(d_states, 2), ds


def dense_gradients(q, k, v, d_out, inverse, states, x, d_states, vectors):
    q, k, v, d_out = map(chunked, (q, k, v, d_out))
    since, beta, until = (vectors[..., i, :, None] for i in (SINCE, BETA, UNTIL))
    strict = jnp.tri(CHUNK, k=-1)
    rest = v - since * (k @ states)
    new = inverse.sum(3) @ (beta * rest)
    d_scores = d_out @ new.mT * decays(vectors)
    d_a = -x @ new.mT * decays(vectors) * strict
    reads, writes, keeps = d_out @ states.mT, x @ states.mT, new @ d_states
    gates = strict * d_scores * (q @ k.mT) + beta * d_a * (k @ k.mT)
    from_state = since * (
        (q * reads).sum(-1, keepdims=True) - beta * (k * writes).sum(-1, keepdims=True)
    )
    gates = gates.at[..., -1, :-1].add((until * k * keeps).sum(-1)[..., :-1])
    spans = jnp.tri(CHUNK).T @ gates * strict
    dg = spans.sum(-1) + (jnp.tri(CHUNK).T @ from_state)[..., 0]
    dq = since * reads + d_scores @ k
    dk = (
        -beta * since * writes
        + until * keeps
        + (beta * d_a) @ k
        + (beta * d_a).mT @ k
        + d_scores.mT @ q
    )
    product = (states * d_states.mT).sum(-2).reshape(*dg.shape[:-1], -1, CHUNK).sum(-2)
    sums = {
        D_BETA: (x * rest).sum(-1),
        D_GATE: dg,
        D_BETA_TOO: (d_a * (k @ k.mT)).sum(-1),
        PRODUCT: product,
    }
    return joined(dq), joined(dk), joined(beta * x), jnp.stack([sums[i] for i in range(SUMS)], 3)


@jax.jit
def both(inputs, d_out, d_last, numbers, others):
    """Gradients by `backward` and by xla.py."""
    _, kept = xla.forward(*inputs, **others)
    inverse, states = (jnp.moveaxis(x, 0, 2) for x in kept)
    q, k, v, g, beta, _ = inputs
    g, beta = g.swapaxes(1, 2), beta.swapaxes(1, 2)
    got = delta_backward.backward(
        q, k, v, g, beta, numbers, inverse[:, :, :, None], states, d_out, d_last
    )
    return got, jax.vjp(lambda *a: xla.gated_delta_rule(*a, **others), *inputs)[1]((d_out, d_last))


@pytest.mark.parametrize("name", CASES)
def test_formulas(name, monkeypatch):
    length, gates, keys, pieces = CASES[name]
    monkeypatch.setattr(delta_backward, "chunk_scan_backward", dense_chunk_scan_backward)
    monkeypatch.setattr(delta_backward, "gradients", dense_gradients)
    inputs, (d_out, d_last) = case(length, gates, keys, value_dim=64)
    others, numbers = {"token_index": None, "segment_ids": None}, None
    if pieces:
        token_index, segment_ids = parity.packing(pieces, length)
        others, numbers = (
            {"token_index": token_index, "segment_ids": segment_ids},
            segment_numbers(token_index, segment_ids),
        )
        inputs = (
            *(
                np.where((token_index < 0).reshape(1, length, *[1] * (x.ndim - 2)), 0, x)
                for x in inputs[:5]
            ),
            inputs[5],
        )
        d_out = np.where((token_index < 0)[..., None, None], 0, d_out)

    (*got, d_g, d_beta, d_initial), want = both(inputs, d_out, d_last, numbers, others)
    valid = True if others["token_index"] is None else (others["token_index"] >= 0)[..., None]
    got = *got, jnp.where(valid, d_g.swapaxes(1, 2), 0), d_beta.swapaxes(1, 2), d_initial
    errors = {
        n: rel_rms(a, b)
        for n, a, b in zip(("q", "k", "v", "g", "beta", "initial"), got, want, strict=True)
    }
    assert all(error < 1e-4 for error in errors.values()), errors


@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "parts"), [(1, 128, 2, 256, 2), (2, 64, 3, 64, 1)]
)
def test_lowers_for_cuda(batch, length, heads, width, parts):
    def arrays(dtype, *shapes):
        return tuple(jax.ShapeDtypeStruct((batch, *shape), dtype) for shape in shapes)

    chunks = heads, length // CHUNK
    q, k, v, d_out = arrays(jnp.bfloat16, *[(length, heads, n) for n in (128, 128, width, width)])
    inverse, states = arrays(jnp.bfloat16, (*chunks, parts, CHUNK, CHUNK), (*chunks, 128, width))
    g, beta, d_last = arrays(jnp.float32, (heads, length), (heads, length), (heads, 128, width))
    (numbers,) = arrays(jnp.int32, (length,))
    traced = jax.jit(delta_backward.backward).trace(
        q, k, v, g, beta, numbers, inverse, states, d_out, d_last
    )
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 2


def test_vectors_hold_what_the_kernels_read():
    vectors = delta_backward.gate_vectors(
        jnp.zeros((1, 2, 128)), jnp.ones((1, 2, 128)), jnp.zeros((1, 128), jnp.int32)
    )
    assert vectors.shape == (1, 2, 2, ROWS, CHUNK)
    wanted = {SUM: 0, SINCE: 1, BETA: 1, UNTIL: 1, SEGMENT: 0}
    assert all((vectors[..., row, :] == value).all() for row, value in wanted.items())
