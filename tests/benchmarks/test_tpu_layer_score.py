"""The static score of a whole Gated DeltaNet layer on TPU stays where it was; the decoding step
that is scored updates its cache in place."""

import json
from pathlib import Path

import jax

from benchmarks.tpu_programs import decode_step, gdn_layer
from pallas_kernels.testing.static_score import score

BASELINES = Path(__file__).parents[1] / "pallas_kernels" / "tpu_baselines.json"
MARGIN = 1.1  # over the baseline


def test_what_is_around_the_kernels():
    baseline = json.loads(BASELINES.read_text("utf-8"))[
        "gated_delta_rule: layer, forward, mosaic_tpu"
    ]
    assert score(gdn_layer, "v5e", "mosaic_tpu", False).milliseconds <= MARGIN * baseline["v5e"]


def test_a_decoding_step_has_the_shapes_of_the_published_model():
    step, (params, cache, slots) = decode_step(8, layers=4)
    assert params.arrays["layers.1.self_attn.input_proj.kernel"].shape == (2048, 12352)
    after, _, token = jax.eval_shape(step, params, cache, slots)
    assert after == cache and token.shape == (8,)
    donated = step.trace(params, cache, slots).lower(lowering_platforms=("tpu",)).as_text()
    kept = donated.count("tf.aliasing_output") + donated.count("jax.buffer_donor")
    assert kept >= len(jax.tree.leaves(cache))
