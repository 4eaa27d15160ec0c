"""What the compiler says of the TPU kernels: that they compile for every generation, and that their static scores meet their targets."""

import jax
import pytest

from benchmarks.kernels import newest
from benchmarks.tpu_programs import conv_kernels, gdn_kernels, gdn_layer, gdn_op
from pallas_kernels.testing.static_score import CHIPS, TOPOLOGIES, score

MARGIN = 1.1  # over what is recorded
RECORDED = {key: line["estimate_ms"] for key, line in newest("tpu_scores", "op", "program", "topology").items()}
# milliseconds at 8192 tokens, 16 heads, K 128, V 256, bfloat16, with everything that training needs
TARGETS = {("walk", "v5e"): 0.35, ("walk", "v6e"): 0.20}


def recorded(op, program, chip):
    return RECORDED[op, program, TOPOLOGIES[chip]]


@pytest.mark.parametrize("chip", CHIPS)
def test_gated_delta_rule(chip):
    found = score(gdn_kernels, chip, "inverse", "walk", "backward")
    for name in ("inverse", "walk", "backward"):
        milliseconds = found.kernel(f"gdn_{name}").milliseconds(chip)
        assert 0 < milliseconds <= MARGIN * recorded("gated_delta_rule", name, chip), (name, milliseconds)


@pytest.mark.parametrize("chip", CHIPS)
def test_causal_conv(chip):
    assert score(conv_kernels, chip).milliseconds <= MARGIN * recorded("short_conv", "forward + backward", chip)


@pytest.mark.parametrize("names", ({"length": 17, "channels": 128}, {"length": 700, "channels": 640, "dtype": "float32"}))
def test_causal_conv_of_other_sizes(names):
    assert len(score(conv_kernels, "v5e", **names).programs) >= 2


def test_targets_are_met():
    for (name, chip), target in TARGETS.items():
        assert recorded("gated_delta_rule", name, chip) <= target, (name, chip)
    for whole in ("forward", "layer, forward"):
        ours, scan = (recorded("gated_delta_rule", f"{whole}, {name}", "v5e") for name in ("mosaic_tpu", "scan_and_solve"))
        assert 1.3 * ours <= scan, whole
    for chip in CHIPS:  # a backward pass is twice the work of a forward pass
        forward = recorded("gated_delta_rule", "inverse", chip) + recorded("gated_delta_rule", "walk", chip)
        assert recorded("gated_delta_rule", "backward", chip) <= 2 * forward, chip


@pytest.mark.parametrize(("build", "program"), [(gdn_op, "forward, mosaic_tpu"), (gdn_layer, "layer, forward, mosaic_tpu")])
def test_what_is_around_the_kernels(build, program):
    """Forward; a scan and triangular_solve, which they are compared with, take long to compile: that score is recorded."""
    assert score(build, "v5e", "mosaic_tpu", False).milliseconds <= MARGIN * recorded("gated_delta_rule", program, "v5e")


def test_the_scan_it_is_compared_with_is_the_same_op():
    function, shapes = gdn_op("scan_and_solve", True, length=128)
    wanted, same = gdn_op("mosaic_tpu", True, length=128)
    assert jax.eval_shape(function, *shapes) == jax.eval_shape(wanted, *same)


@pytest.mark.parametrize("names", ({"length": 40}, {"length": 300, "dtype": "float32", "heads": 1}, {"widths": (256, 384), "heads": 3}))
def test_gated_delta_rule_of_other_sizes(names):
    assert len(score(gdn_kernels, "v5e", "inverse", "walk", "backward", **names).programs) >= 3


def test_failures_name_the_program():
    with pytest.raises(RuntimeError, match="gdn_kernels does not compile for v5e(.|\\n)*KeyError: 'run'"):
        score(gdn_kernels, "v5e", "run")
