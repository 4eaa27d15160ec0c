"""The hybrid model against an independent float64 decoder, and its stepwise equalities."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import decode, published
from tiny import conversation, hybrid

from infinitevl_jax.model.inputs import prepare, vision_items
from infinitevl_jax.model.positions import sequence_positions
from pallas_kernels.testing.parity import rel_rms


@pytest.fixture(scope="module")
def model():
    return hybrid()


def embedded(model, batch):
    """Embeddings [length, width] and positions [3, length] of one sequence, vision tokens included."""
    config = model.config
    prepared = prepare(config, **batch)
    tokens = np.asarray(model._encode(model.params, prepared.patches))[0]
    x = np.asarray(model.params["embed_tokens.embedding"])[batch["input_ids"][0]].copy()
    seen = prepared.inputs.vision_index[0] >= 0
    x[seen] = tokens[prepared.inputs.vision_index[0][seen]]
    grids = batch["image_grid_thw"], batch["video_grid_thw"], batch["second_per_grid_ts"]
    images, videos = vision_items(*grids, config)
    positions, _ = sequence_positions(batch["input_ids"][0], iter(images), iter(videos), config, 0, "")
    return x, positions


def test_whole_hybrid_against_float64(model):
    batch = conversation(model.config, text=120)  # 160 tokens: far past the window of 24
    x, positions = embedded(model, batch)
    expected = decode(published(model.params, model.config), model.config.text, x, positions)
    assert rel_rms(model(**batch).logits[0], expected) <= 1e-5


def test_bf16_stays_near_float64(model):
    from infinitevl_jax import InfiniteVL

    half = InfiniteVL(model.config, {n: p.astype(jnp.bfloat16) for n, p in model.params.items()})
    batch = conversation(model.config)
    x, positions = embedded(half, batch)
    expected = decode(published(half.params, half.config), half.config.text, x, positions)
    assert half(**batch).logits.dtype == jnp.float32
    assert rel_rms(half(**batch).logits[0], expected) <= 0.03
