"""The parity matrix itself: it passes what is right, and catches what is not."""

import sys

import pytest

from pallas_kernels.attend import xla
from pallas_kernels.dispatch import Implementation
from pallas_kernels.testing import matrix


def run(monkeypatch, *arguments, attend=None):
    """The command, for attend by one implementation alone; the code that it ends with."""
    if attend:
        monkeypatch.setitem(matrix.IMPLEMENTATIONS, "attend", (Implementation("xla", attend),))
    monkeypatch.setattr(sys, "argv", ["matrix", *arguments])
    try:
        matrix.main()
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(("operator", "case"), [("attend", "^(ring, 65 x 64|pads only|rows of)"), ("gated_delta_rule", "^pads")])
def test_interpreted_kernels_pass(monkeypatch, capsys, operator, case):
    assert run(monkeypatch, "--operator", operator, "--case", case) is None
    lines = capsys.readouterr().out.splitlines()
    for name in ("mosaic_tpu", "xla"):
        assert any(line.split()[0] == name and "of what is allowed" in line for line in lines)
    assert all("of what is allowed" in line or "no: " in line for line in lines[1:-1]), lines


def test_a_wrong_result_fails(monkeypatch, capsys):
    def attend(*args, **kwargs):
        out, lse = xla.attend(*args, **kwargs)
        return out * 1.01, lse

    assert run(monkeypatch, "--operator", "attend", "--case", "window, 63", attend=attend)
    assert "100.00 of what is allowed out" in capsys.readouterr().out  # float32 may have 0.01 %


def test_a_race_fails(monkeypatch, capsys):
    def attend(*args, **kwargs):
        print("RACE DETECTED")
        return xla.attend(*args, **kwargs)

    assert run(monkeypatch, "--operator", "attend", "--case", "window, 63", attend=attend)
    assert "inf of what is allowed race" in capsys.readouterr().out


def test_a_pad_that_is_read_fails(monkeypatch, capsys):
    def attend(q, k, v, **rest):
        out, lse = xla.attend(q, k, v, **rest)
        return out + 0 * v.sum(), lse

    assert run(monkeypatch, "--operator", "attend", "--case", "no window, 300", attend=attend)
    assert "nan of what is allowed" in capsys.readouterr().out


def test_nothing_to_run_is_no_success(monkeypatch):
    assert "no case of that name" in run(monkeypatch, "--case", "windwo")
