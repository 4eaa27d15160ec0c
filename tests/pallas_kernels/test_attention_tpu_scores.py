"""The static scores of the attention kernels for TPU stay where they were (tpu_baselines.json), and
the language layer needs little memory on every generation of the chip."""

import pytest
from test_tpu_scores import MARGIN, baseline

from pallas_kernels.testing.static_score import CHIPS
from pallas_kernels.testing.visit_score import CASES, KERNELS, scores


@pytest.mark.parametrize("chip", CHIPS)
def test_decoder_layer(chip):
    found = scores(chip, **CASES["decoder layer"])
    assert [x.kernel for x in found] == list(KERNELS)
    for x in found:
        assert x.milliseconds <= MARGIN * baseline("attend", f"decoder layer: {x.kernel}", chip), x
        assert x.temporaries < 200e6  # no scores, nothing repeated for each query head


def test_failures_name_the_case():
    with pytest.raises(RuntimeError, match="attention does not compile for v5e.*'width': 200"):
        scores("v5e", **CASES["decoder layer"] | {"width": 200})
