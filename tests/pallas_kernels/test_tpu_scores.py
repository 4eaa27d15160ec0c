"""What the compiler says of the TPU kernels: that they compile for every generation, and that their static scores meet their targets."""

import jax
import pytest

from benchmarks.tpu_programs import gdn_kernels, gdn_op
from pallas_kernels.testing.static_score import CHIPS, score

MARGIN = 1.1
# milliseconds at 8192 tokens, 16 heads, K 128, V 256, bfloat16, with everything that training needs
TARGETS = {"gdn_inverse": {}, "gdn_walk": {"v5e": 0.35, "v6e": 0.20}, "gdn_walk_back": {"v5e": 0.70, "v6e": 0.40}}


@pytest.mark.parametrize("chip", CHIPS)
def test_gated_delta_rule(chip):
    found = score(gdn_kernels, chip, "inverse", "walk", "walk_back")
    for name, targets in TARGETS.items():
        milliseconds = found.kernel(name).milliseconds(chip)
        assert 0 < milliseconds <= MARGIN * targets.get(chip, 1.0), (name, milliseconds)


def test_gated_delta_rule_beats_scan_and_solve():
    """The whole op, forward: 8.66 ms with a scan and triangular_solve (benchmarks/results/tpu_scores.jsonl), which take long to compile."""
    assert score(gdn_op, "v5e", "mosaic_tpu", False).milliseconds <= 8.66 / 1.3


def test_the_scan_it_is_compared_with_is_the_same_op():
    function, shapes = gdn_op("scan_and_solve", True, length=128)
    wanted, same = gdn_op("mosaic_tpu", True, length=128)
    assert jax.eval_shape(function, *shapes) == jax.eval_shape(wanted, *same)


@pytest.mark.parametrize("names", ({"length": 40}, {"length": 300, "dtype": "float32", "heads": 1}, {"widths": (256, 384), "heads": 3}))
def test_gated_delta_rule_of_other_sizes(names):
    assert len(score(gdn_kernels, "v5e", "inverse", "walk", "walk_back", **names).programs) >= 3


def test_failures_name_the_program():
    with pytest.raises(RuntimeError, match="gdn_kernels does not compile for v5e(.|\\n)*KeyError: 'run'"):
        score(gdn_kernels, "v5e", "run")
