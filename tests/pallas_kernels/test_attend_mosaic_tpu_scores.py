"""The static scores of the attention kernels for TPU stay where they were (benchmarks/results/tpu_scores.jsonl)."""

import pytest

from benchmarks.tpu_scores import ATTEND
from pallas_kernels.testing.visit_score import KERNELS, scores

MARGIN = 1.1
# milliseconds of forward, gradient of the queries, gradients of keys and values
RECORDED = {"v5e": (1.63, 2.05, 2.53), "v6e": (0.87, 1.08, 1.38)}


@pytest.mark.parametrize("chip", RECORDED)
def test_decoder_layer(chip):
    found = scores(chip, **ATTEND["decoder layer"])
    assert [x.kernel for x in found] == list(KERNELS)
    for x, recorded in zip(found, RECORDED[chip], strict=True):
        assert x.milliseconds <= MARGIN * recorded, x


def test_failures_name_the_case():
    with pytest.raises(RuntimeError, match="attention does not compile for v5e.*'width': 200"):
        scores("v5e", **ATTEND["decoder layer"] | {"width": 200})
