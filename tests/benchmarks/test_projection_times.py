"""What the benchmark of projections times has been checked; its figures are those of the trace."""

import json
import re
import sys

import jax.numpy as jnp
import pytest

from benchmarks import projection as benchmark
from benchmarks.trace import Kernel
from pallas_kernels.projection import xla
from pallas_kernels.projection.hopper.plan import Plan

SMALL = {"small": (512, 128, {"norm": True, "gated": True, "bias": True, "residual": True})}
PLAN = Plan(128, 1, 2**16, 1, 132)


def launched(*us, gap=1.0):
    """Kernels that ran one after the other."""
    found, start = [], 10.0
    for time in us:
        found.append(Kernel("projection", time, "", "GPU:0", start))
        start += time + gap
    return found


@pytest.fixture
def on_a_cpu(monkeypatch, tmp_path):
    """A small product by `xla` alone, traces of one microsecond a kernel; the recorded lines."""
    lines = []
    monkeypatch.setattr(benchmark, "PUBLISHED", SMALL)
    monkeypatch.setattr(benchmark, "L2", 2**17)
    monkeypatch.setattr(benchmark, "projection", lambda plan, **arrays: xla.projection(**arrays))

    def traced(runs):
        return launched(*[1.0] * sum(len(run()) for run in runs))

    monkeypatch.setattr(benchmark, "traced", traced)
    monkeypatch.setattr(benchmark, "record", lambda *line: lines.append(line))
    return lines


def test_times_of_equal_programs():
    first, second = benchmark.times(launched(2, 4, 3, 5), runs=2, products=2)
    assert first == {"kernel_us": 3, "us": 3.5, "kernels": 1}
    assert second == {"kernel_us": 4, "us": 4.5, "kernels": 1}
    assert benchmark.median([first, second])["kernel_us"] == 3.5
    with pytest.raises(ValueError, match="3 kernels of 2 equal programs"):
        benchmark.times(launched(1, 1, 1), runs=2, products=1)
    with pytest.raises(ValueError, match="0 kernels"):
        benchmark.times([], runs=2, products=1)


def test_what_is_wrong_is_not_timed():
    right = [jnp.ones((1, 4), jnp.bfloat16)]
    want = jnp.ones((1, 4))
    assert benchmark.check(right, right, want, [jnp.ones((2, 4), jnp.bfloat16)]) == 0
    wrong = [1.01 * right[0]]
    with pytest.raises(ValueError, match="not timed: error"):
        benchmark.check(wrong, wrong, want, None)
    with pytest.raises(ValueError, match="not timed: error nan"):
        benchmark.check([jnp.nan * right[0]], right, want, None)
    off = [right[0].at[0, 0].set(1.0078125)]
    with pytest.raises(ValueError, match="other bits$"):
        benchmark.check(right, off, want, None)
    with pytest.raises(ValueError, match="when they are more"):
        benchmark.check(right, right, want, [jnp.concatenate([off[0], right[0]])])


@pytest.mark.parametrize("size", benchmark.PUBLISHED)
def test_candidates_fit(size):
    found = benchmark.candidates(size)
    assert len(found) == len(set(found)) > 10
    assert benchmark.matrices(size) * benchmark.matrix_bytes(size) >= 5 * benchmark.L2


def test_measure(on_a_cpu):
    benchmark.measure("small", [1, 3], PLAN, 3000.0, "commit")
    assert [(line["rows"], line["implementation"]) for _, _, line in on_a_cpu] == [
        (3, "mosaic_gpu"), (3, "xla"), (1, "mosaic_gpu"), (1, "xla"),
    ]  # fmt: skip
    for name, commit, line in on_a_cpu:
        assert (name, commit) == ("projection", "commit") and json.dumps(line)
        assert line["kernel_us"] == 1 and line["us"] > 1 and 0 < line["error"] <= benchmark.ALLOWED
        assert line["gb_s"] == round(2 * 512 * 256 / 1e3)
        assert line["share"] == round(line["gb_s"] / 3000, 3) and line["copy_gb_s"] == 3000
        assert ("plan" in line) == (line["implementation"] == "mosaic_gpu")


def test_a_failure_is_reported_and_the_others_measured(on_a_cpu, monkeypatch, capsys):
    def wrong(plan, **arrays):
        return 1.1 * xla.projection(**arrays)

    monkeypatch.setattr(benchmark, "projection", wrong)
    benchmark.measure("small", [2], PLAN, 3000.0, "commit")
    assert [line["implementation"] for _, _, line in on_a_cpu] == ["xla"]
    assert "small, 2 rows, by mosaic_gpu fails: ValueError: not timed" in capsys.readouterr().out


def test_sweep_returns_the_fastest(on_a_cpu, monkeypatch, capsys):
    plans = [PLAN, Plan(64, 1, 2**16, 1, 132), Plan(64, 2, 2**16, 1, 132)]
    monkeypatch.setattr(benchmark, "candidates", lambda size: plans)
    products = benchmark.matrices("small")
    us = [3.0] * 5 * products + [1.0] * 5 * products + [2.0] * 5 * products
    monkeypatch.setattr(benchmark, "traced", lambda runs: launched(*us))
    assert benchmark.sweep("small", 2, 3000.0, "commit") == plans[1]
    assert [line["kernel_us"] for _, _, line in on_a_cpu] == [3, 1, 2]
    assert [line["chosen"] for _, _, line in on_a_cpu] == [True, False, False]
    text = capsys.readouterr().out.splitlines()
    assert "'kernel_us': 1.0" in text[0] and text[-1].endswith("(chosen now)") and len(text) == 3


@pytest.mark.parametrize("arguments", [["--help"], ["--rows", "17"], ["--sizes", "nothing"]])
def test_command(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["projection", *arguments])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    said = capsys.readouterr()
    if arguments == ["--help"]:
        assert end.value.code == 0 and "--sweep" in said.out
    else:
        assert end.value.code == 2 and re.search("17|nothing", said.err)
