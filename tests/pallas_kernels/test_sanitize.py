"""What compute-sanitizer says is read rightly: findings, none, and a tool that did not come to its
end."""

import subprocess
import sys

import jax
import pytest

from pallas_kernels.testing import sanitize

RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at race_mosaic_gpu_kernel+0x90
=========     and Read access at race_mosaic_gpu_kernel+0xb0 [512 hazards]
========= Error: Race reported between Write access at race_mosaic_gpu_kernel+0x90
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
UNINITIALISED = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at walk_mosaic_gpu_kernel+0x50
========= ERROR SUMMARY: 128 errors
"""
OF_XLA = """========= Uninitialized __global__ memory read of size 8 bytes
=========     at input_reduce_fusion+0x160
========= ERROR SUMMARY: 1 error
"""
DIED = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
"""


@pytest.mark.parametrize(
    ("said", "total", "kinds"),
    [
        (RACE, 2, {"Error: Race reported between Write access at race_mosaic_gpu_kernel+_": 2}),
        (
            UNINITIALISED,
            128,
            {"Uninitialized __global__ memory read of size _ bytes at walk_mosaic_gpu_kernel": 1},
        ),
        (
            OF_XLA,
            1,
            {"Uninitialized __global__ memory read of size _ bytes at input_reduce_fusion": 1},
        ),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, {}),
        ("========= ERROR SUMMARY: 0 errors\n", 0, {}),
        (
            DIED,
            None,
            {"Error: Target application terminated before first instrumented API call": 1},
        ),
        ("", None, {}),
    ],
)
def test_findings(said, total, kinds):
    assert sanitize.findings(said) == (total, kinds)


def test_only_options_that_the_version_has_are_given():
    line = sanitize.command("sanitizer", "racecheck", "--check-tensor-ops arg (=no)", ["-m", "x"])
    assert "--check-tensor-ops=yes" in line and not any(
        "warpgroup" in x or "initcheck" in x for x in line
    )
    assert line[-3:] == [sys.executable, "-m", "x"]


class Stop(Exception):
    """The wrong kernels were lowered, and are not to run."""


@pytest.mark.parametrize(("kind", "kernels"), [("race", 1), ("uninitialised", 2)])
def test_wrong_kernels_lower_for_cuda(monkeypatch, kind, kernels):
    def lowered(run):
        text = jit(run).trace().lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu_v2") == kernels
        raise Stop

    jit = jax.jit
    monkeypatch.setattr(jax, "jit", lowered)
    with pytest.raises(Stop):
        sanitize.wrong_kernels(kind)


@pytest.mark.parametrize(
    ("said", "ends", "prints"),
    [
        (RACE, 1, "racecheck: 2 findings"),  # in the control, and in the cells
        ("========= RACECHECK SUMMARY: 0 hazards displayed\n", 1, "BLIND"),
        (DIED, 1, "it did not run"),
    ],
)
def test_what_ends_with_an_error(monkeypatch, capsys, tmp_path, said, ends, prints):
    monkeypatch.setattr(
        subprocess, "run", lambda line, **how: subprocess.CompletedProcess(line, 0, said, "")
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "sanitize",
            "--tool",
            "racecheck",
            "--sanitizer",
            sys.executable,
            "--log",
            str(tmp_path / "log"),
        ],
    )
    with pytest.raises(SystemExit) as end:
        sanitize.main()
    assert end.value.code == ends and prints in capsys.readouterr().out


@pytest.mark.parametrize(
    "cells", ["========= RACECHECK SUMMARY: 0 hazards displayed\n", OF_XLA], ids=["none", "XLA's"]
)
def test_a_tool_that_sees_the_wrong_kernel_and_nothing_else_is_content(
    monkeypatch, capsys, tmp_path, cells
):
    def run(line, **how):
        return subprocess.CompletedProcess(line, 0, RACE if "--wrong" in line else cells, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "sanitize",
            "--tool",
            "racecheck",
            "--sanitizer",
            sys.executable,
            "--log",
            str(tmp_path / "log"),
        ],
    )
    with pytest.raises(SystemExit) as end:
        sanitize.main()
    assert not end.value.code and "it finds what is wrong" in capsys.readouterr().out
