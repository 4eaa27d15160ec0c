"""The static score of a whole Gated DeltaNet layer on TPU stays where it was."""

import json
from pathlib import Path

from benchmarks.tpu_programs import gdn_layer
from pallas_kernels.testing.static_score import score

BASELINES = Path(__file__).parents[1] / "pallas_kernels" / "tpu_baselines.json"
MARGIN = 1.1  # over the baseline


def test_what_is_around_the_kernels():
    baseline = json.loads(BASELINES.read_text("utf-8"))[
        "gated_delta_rule: layer, forward, mosaic_tpu"
    ]
    assert score(gdn_layer, "v5e", "mosaic_tpu", False).milliseconds <= MARGIN * baseline["v5e"]
