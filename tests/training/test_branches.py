"""An image encoded once with its questions on branches must train exactly as every question with its own copy of the image."""

import sys
from pathlib import Path

import jax
import numpy as np

from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.model.inputs import Inputs, prepare
from infinitevl_jax.model.params import initialize
from infinitevl_jax.training.step import evaluate_batch, model_of
from pallas_kernels.testing.parity import rel_rms

sys.path.append(str(Path(__file__).parent.parent / "model"))
from tiny import END, IMAGE, START, hybrid_config, loud  # noqa: E402  the model tests' tiny configurations


def test_branches_equal_whole_conversations_with_gradients():
    config = hybrid_config(layers=5, window=24)
    params = loud(initialize(config, jax.random.key(0), scanned=True))
    model = model_of(config, RunConfig())
    rng = np.random.default_rng(0)
    prefix = [START] + [IMAGE] * 6 + [END]
    pixels = rng.normal(size=(2, 24, config.vision.patch_features)).astype(np.float32)
    grid = [[1, 4, 6]]
    questions, parents = rng.integers(1, 90, (5, 7)), np.array([0, 0, 1, 1, 1], np.int32)
    weights = np.zeros((5, 6), np.float32)
    weights[:, -2:] = 1

    first = prepare(config, [prefix] * 2, pixel_values=pixels.reshape(48, -1), image_grid_thw=grid * 2, row_per_sequence=True)
    index = np.broadcast_to(np.arange(6, dtype=np.int32), (5, 6))
    branches = Inputs(questions[:, :-1], index, np.zeros((5, 6), np.int32), None, None)
    branched = TrainBatch(first.patches, first.inputs, branches, parents, questions[:, 1:], weights)

    whole = [prefix + q[:-1].tolist() for q in questions]
    alone = prepare(config, whole, pixel_values=pixels[parents].reshape(120, -1), image_grid_thw=grid * 5, row_per_sequence=True)
    pad = np.zeros((5, len(prefix)), np.int32)
    rows = TrainBatch(
        alone.patches, None, alone.inputs, None, np.concatenate([pad, questions[:, 1:]], 1), np.concatenate([pad, weights], 1)
    )

    loss = jax.jit(jax.value_and_grad(lambda params, batch: evaluate_batch(model, params, batch).loss))
    value, gradient = loss(params, branched)
    expected, wanted = loss(params, rows)
    assert rel_rms(value, expected) <= 1e-5
    for name, g in wanted.items():
        assert rel_rms(gradient[name], g) <= 2e-5, name
