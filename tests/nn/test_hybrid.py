"""The whole hybrid (images, video, text far past the window) against an independent decoder."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import logits
from tiny import conversation, hybrid

from infinitevl_jax import InfiniteVL
from pallas_kernels.testing.parity import rel_rms


@pytest.fixture(scope="module")
def model():
    return hybrid()


def test_float32_against_float64(model):
    batch = conversation(model.config, text=120)  # 160 tokens, a window of 24
    assert (
        rel_rms(model(**batch).logits[0], logits(model.params, model.config, batch, torch.float64))
        <= 1e-5
    )


def test_bfloat16_is_as_near_as_torchs_own(model):
    half = InfiniteVL(
        model.config, {name: p.astype(jnp.bfloat16) for name, p in model.params.items()}
    )
    ours, theirs = [], []
    for seed in range(3):
        batch = conversation(model.config, seed, text=120)
        exact = logits(half.params, half.config, batch, torch.float64)  # on the rounded weights
        ours.append(rel_rms(half(**batch).logits[0], exact))
        theirs.append(rel_rms(logits(half.params, half.config, batch, torch.bfloat16), exact))
    assert half(**batch).logits.dtype == jnp.float32
    assert np.mean(ours) <= 1.5 * np.mean(theirs), (ours, theirs)
