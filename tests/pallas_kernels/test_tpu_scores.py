"""What the compiler says of the TPU kernels: that they compile for every generation, and that their
static scores meet their targets."""

import json
from pathlib import Path

import jax
import pytest

from pallas_kernels.testing.static_score import CHIPS, score
from pallas_kernels.testing.tpu_programs import conv_kernels, gdn_kernels, gdn_op, projections

MARGIN = 1.1  # over the baselines
# Milliseconds by program and chip, as `python -m benchmarks.tpu_scores --whole` gave them when the
# kernels were last made faster. They stand here and not in benchmarks/results, for a measurement
# must not move the bound of a test.
BASELINES = json.loads(Path(__file__).with_name("tpu_baselines.json").read_text("utf-8"))
# milliseconds at 8192 tokens, 16 heads, K 128, V 256, bfloat16, with everything that training needs
TARGETS = {("chunk_scan", "v5e"): 0.35, ("chunk_scan", "v6e"): 0.20}


def baseline(op, program, chip):
    return BASELINES[f"{op}: {program}"][chip]


@pytest.mark.parametrize("chip", CHIPS)
def test_gated_delta_rule(chip):
    found = score(gdn_kernels, chip, "inverse", "chunk_scan", "backward")
    for name in ("inverse", "chunk_scan", "backward"):
        milliseconds = found.kernel(f"gdn_{name}").milliseconds(chip)
        assert 0 < milliseconds <= MARGIN * baseline("gated_delta_rule", name, chip), (
            name,
            milliseconds,
        )


@pytest.mark.parametrize("chip", CHIPS)
def test_causal_conv(chip):
    assert score(conv_kernels, chip).milliseconds <= MARGIN * baseline(
        "causal_conv", "forward + backward", chip
    )


@pytest.mark.parametrize(
    "names", ({"length": 17, "channels": 128}, {"length": 700, "channels": 640, "dtype": "float32"})
)
def test_causal_conv_of_other_sizes(names):
    assert len(score(conv_kernels, "v5e", **names).programs) >= 2


def test_one_row_is_multiplied_by_matrix_units():
    """Gates and ups of one token take at most twice the time to read them, which is counted."""
    found = score(projections, "v5e", 1, "gates and ups")
    needed = 2 * 2048 * 2 * 11008
    assert 0.99 * needed <= sum(program.bytes for program in found.programs) <= 1.3 * needed
    assert found.milliseconds <= 2 * 1e3 * needed / CHIPS["v5e"].bandwidth


def test_targets_are_met():
    for (name, chip), target in TARGETS.items():
        assert baseline("gated_delta_rule", name, chip) <= target, (name, chip)
    for whole in ("forward", "layer, forward"):
        ours, scan = (
            baseline("gated_delta_rule", f"{whole}, {name}", "v5e")
            for name in ("mosaic_tpu", "scan_and_solve")
        )
        assert 1.3 * ours <= scan, whole
    for chip in CHIPS:  # a backward pass is twice the work of a forward pass
        forward = baseline("gated_delta_rule", "inverse", chip) + baseline(
            "gated_delta_rule", "chunk_scan", chip
        )
        assert baseline("gated_delta_rule", "backward", chip) <= 2 * forward, chip


def test_what_is_around_the_kernels():
    """Forward only. The scan and triangular_solve that it is compared with take long to compile:
    that score is recorded."""
    found = score(gdn_op, "v5e", "mosaic_tpu", False).milliseconds
    assert found <= MARGIN * baseline("gated_delta_rule", "forward, mosaic_tpu", "v5e")


def test_the_scan_it_is_compared_with_is_the_same_op():
    function, shapes = gdn_op("scan_and_solve", True, length=128)
    wanted, same = gdn_op("mosaic_tpu", True, length=128)
    assert jax.eval_shape(function, *shapes) == jax.eval_shape(wanted, *same)


@pytest.mark.parametrize(
    "names",
    (
        {"length": 40},
        {"length": 300, "dtype": "float32", "heads": 1},
        {"widths": (256, 384), "heads": 3},
    ),
)
def test_gated_delta_rule_of_other_sizes(names):
    assert (
        len(score(gdn_kernels, "v5e", "inverse", "chunk_scan", "backward", **names).programs) >= 3
    )


def test_failures_name_the_program():
    with pytest.raises(
        RuntimeError, match="gdn_kernels does not compile for v5e(.|\\n)*KeyError: 'run'"
    ):
        score(gdn_kernels, "v5e", "run")
