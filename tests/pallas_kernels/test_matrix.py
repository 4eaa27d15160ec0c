"""The parity matrix itself: it passes what is right, and catches what is not."""

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attend import decode as attend_decode
from pallas_kernels.attend import xla
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_delta_rule import decode as delta_decode
from pallas_kernels.testing import matrix
from pallas_kernels.testing.steps import in_a_row


def run(monkeypatch, *arguments, **functions):
    """The command, with functions as the only implementations of their operators; the code that it ends with."""
    for operator, function in functions.items():
        monkeypatch.setitem(matrix.IMPLEMENTATIONS, operator, (Implementation("xla", function),))
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
    assert all("of what is allowed" in line or "no: " in line for line in lines[1:]), lines


STEPS = {"attend_step": "^(short|still|a seq|two|window of 100|small|an odd)", "gated_delta_step": "^(still|two|extreme|fresh|keys)"}


@pytest.mark.parametrize("operator", STEPS)
def test_token_steps_pass(monkeypatch, capsys, operator):
    assert run(monkeypatch, "--operator", operator, "--case", STEPS[operator]) is None
    _, *lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"mosaic_gpu", "xla"}
    for line in lines:
        assert ("no: for Hopper GPUs" if line.split()[0] == "mosaic_gpu" else "of what is allowed") in line


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


def test_a_cotangent_of_a_pad_that_is_read_fails(monkeypatch, capsys):
    def attend(q, k, v, k_index, **rest):
        out, lse = xla.attend(q, k, v, k_index=k_index, **rest)
        return out + 0 * jnp.where(k_index[:, :, None, None] >= 0, v, 0).sum(), lse

    assert run(monkeypatch, "--operator", "attend", "--case", "no window, 300", attend=attend)
    assert "nan of what is allowed" in capsys.readouterr().out


def louder_ring(*args, **rule):
    out, ring = attend_decode.step(*args, **rule)
    return out, ring._replace(k=ring.k * (1 + 2**-20))


def no_negative_zero(*args, **rule):
    out, state = delta_decode.step(*args, **rule)
    return out, state._replace(memory=jnp.where(state.memory == 0, 0, state.memory))


def still_ones_speak(inputs, weights, state, index, eps):
    out, state = delta_decode.step(inputs, weights, state, index, eps)
    return jnp.where(index[:, None] < 0, 1e-9, out), state


@pytest.mark.parametrize(
    ("operator", "step", "result"),
    [
        ("attend_step", louder_ring, "ring_k"),
        ("gated_delta_step", no_negative_zero, "memory"),
        ("gated_delta_step", still_ones_speak, "out"),
    ],
)
def test_what_must_be_exact_and_is_not_fails(monkeypatch, capsys, operator, step, result):
    assert run(monkeypatch, "--operator", operator, "--case", "two tokens", **{operator: in_a_row(step)})
    assert f"inf of what is allowed {result}" in capsys.readouterr().out


def test_nothing_to_run_is_no_success(monkeypatch):
    assert "no case of that name" in run(monkeypatch, "--case", "windwo")


def now_and_then(change, unordered=()):
    """XLA's attend, but of every third call the gradient in q is another, as a race would make it."""
    calls = itertools.count(1)

    def attend(q, *args, **kwargs):
        third = jax.pure_callback(lambda: np.bool_(next(calls) % 3 == 0), jax.ShapeDtypeStruct((), bool))
        return xla.attend(change(q, third), *args, **kwargs)

    return Implementation("xla", attend, unordered=unordered)


@jax.custom_vjp
def loud_gradient(x, third, factor):
    return x


loud_gradient.defvjp(
    lambda x, third, factor: (x, (third, factor)),
    lambda kept, ct: (jnp.where(kept[0], ct * kept[1], ct).astype(ct.dtype), None, None),
)


def times(factor):
    return lambda q, third: loud_gradient(q, third, factor)


@pytest.mark.parametrize(
    ("implementation", "passes"),
    [
        (now_and_then(times(1.0)), True),
        (now_and_then(times(1 + 2**-20)), False),  # a hundredth of what is allowed, but claimed to be the same each time
        (now_and_then(times(1 + 2**-20), ("d_q",)), True),
        (now_and_then(times(1 + 2**-20), ("d_k",)), False),
        (now_and_then(times(1.01), ("d_q",)), False),  # too far in some of the calls
    ],
)
def test_a_result_that_differs_now_and_then_fails(monkeypatch, capsys, tmp_path, implementation, passes):
    monkeypatch.setitem(matrix.IMPLEMENTATIONS, "attend", (implementation,))
    record = tmp_path / "record.jsonl"
    arguments = "--operator", "attend", "--case", "^window, 63", "--only", "float32", "--repeats", "7", "--record", str(record)
    assert (run(monkeypatch, *arguments) is None) == passes
    (cell,) = map(json.loads, record.read_text().splitlines())
    assert cell["passed"] == passes and cell["repeats"] == 7
