"""The parity matrix itself: it passes what is right, and catches what is not."""

import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import step as attention_step
from pallas_kernels.attention import xla
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_delta_rule import step as delta_step
from pallas_kernels.testing import disturb, matrix
from pallas_kernels.testing.cases import CASES, mesh_shapes
from pallas_kernels.testing.judge import judge
from pallas_kernels.testing.steps import in_a_row


def run(monkeypatch, *arguments, **functions):
    """The command, with functions as the only implementations of their operators; the code that it
    ends with."""
    for operator, function in functions.items():
        monkeypatch.setitem(matrix.IMPLEMENTATIONS, operator, (Implementation("xla", function),))
    monkeypatch.setattr(sys, "argv", ["matrix", *arguments])
    try:
        matrix.main()
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    ("operator", "case"),
    [
        ("attention", "^(ring, 65 x 64|pads only|rows of)"),
        ("gated_delta_rule", "^pads"),
        ("short_conv", "^(pads|packed, 130|joint, pads)"),
    ],
)
def test_interpreted_kernels_pass(monkeypatch, capsys, operator, case):
    assert run(monkeypatch, "--operator", operator, "--case", case) is None
    lines = capsys.readouterr().out.splitlines()
    for name in ("mosaic_tpu", "xla"):
        assert any(line.split()[0] == name and "of what is allowed" in line for line in lines)
    assert all("of what is allowed" in line or "no: " in line for line in lines[1:]), lines


STEPS = {
    "attention_step": "^(short|still|a seq|two|window of 100|small|an odd)",
    "gated_delta_rule_step": "^(still|two|extreme|fresh|keys)",
}


@pytest.mark.parametrize("operator", STEPS)
def test_token_steps_pass(monkeypatch, capsys, operator):
    assert run(monkeypatch, "--operator", operator, "--case", STEPS[operator]) is None
    _, *lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"mosaic_gpu", "xla"}
    for line in lines:
        assert (
            "no: for Hopper GPUs" if line.split()[0] == "mosaic_gpu" else "of what is allowed"
        ) in line


def test_a_wrong_result_fails(monkeypatch, capsys):
    def attention(*args, **kwargs):
        out, lse = xla.attention(*args, **kwargs)
        return out * 1.01, lse

    assert run(monkeypatch, "--operator", "attention", "--case", "window, 63", attention=attention)
    assert "100.00 of what is allowed out" in capsys.readouterr().out  # float32 may have 0.01 %


def test_a_race_fails(monkeypatch, capsys):
    def attention(*args, **kwargs):
        print("RACE DETECTED")
        return xla.attention(*args, **kwargs)

    assert run(monkeypatch, "--operator", "attention", "--case", "window, 63", attention=attention)
    assert "inf of what is allowed race" in capsys.readouterr().out


def test_a_pad_that_is_read_fails(monkeypatch, capsys):
    def attention(q, k, v, **rest):
        out, lse = xla.attention(q, k, v, **rest)
        return out + 0 * v.sum(), lse

    assert run(
        monkeypatch, "--operator", "attention", "--case", "no window, 300", attention=attention
    )
    assert "nan of what is allowed" in capsys.readouterr().out


def test_a_cotangent_of_a_pad_that_is_read_fails(monkeypatch, capsys):
    def attention(q, k, v, k_token_index, **rest):
        out, lse = xla.attention(q, k, v, k_token_index=k_token_index, **rest)
        return out + 0 * jnp.where(k_token_index[:, :, None, None] >= 0, v, 0).sum(), lse

    assert run(
        monkeypatch, "--operator", "attention", "--case", "no window, 300", attention=attention
    )
    assert "nan of what is allowed" in capsys.readouterr().out


def louder_cache(*args, **rule):
    out, kv_cache = attention_step.step(*args, **rule)
    return out, kv_cache._replace(k=kv_cache.k * (1 + 2**-20))


def no_negative_zero(*args, **rule):
    out, state = delta_step.step(*args, **rule)
    return out, state._replace(
        recurrent_state=jnp.where(state.recurrent_state == 0, 0, state.recurrent_state)
    )


def still_ones_speak(inputs, weights, state, token_index, eps):
    out, state = delta_step.step(inputs, weights, state, token_index, eps)
    return jnp.where(token_index[:, None] < 0, 1e-9, out), state


@pytest.mark.parametrize(
    ("operator", "step", "result"),
    [
        ("attention_step", louder_cache, "k_cache"),
        ("gated_delta_rule_step", no_negative_zero, "recurrent_state"),
        ("gated_delta_rule_step", still_ones_speak, "out"),
    ],
)
def test_what_must_be_exact_and_is_not_fails(monkeypatch, capsys, operator, step, result):
    assert run(
        monkeypatch, "--operator", operator, "--case", "two tokens", **{operator: in_a_row(step)}
    )
    assert f"inf of what is allowed {result}" in capsys.readouterr().out


def test_nothing_to_run_is_no_success(monkeypatch):
    assert "no case of that name" in run(monkeypatch, "--case", "windwo")


def now_and_then(change, unordered=()):
    """XLA's attention, but of every third call the gradient in q is another, as a race would make
    it."""
    calls = itertools.count(1)

    def attention(q, *args, **kwargs):
        third = jax.pure_callback(
            lambda: np.bool_(next(calls) % 3 == 0), jax.ShapeDtypeStruct((), bool)
        )
        return xla.attention(change(q, third), *args, **kwargs)

    return Implementation("xla", attention, unordered=unordered)


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
        (
            now_and_then(times(1 + 2**-20)),
            False,
        ),  # a hundredth of what is allowed, but claimed to be the same each time
        (now_and_then(times(1 + 2**-20), ("d_q",)), True),
        (now_and_then(times(1 + 2**-20), ("d_k",)), False),
        (now_and_then(times(1.01), ("d_q",)), False),  # too far in some of the calls
    ],
)
def test_a_result_that_differs_now_and_then_fails(
    monkeypatch, capsys, tmp_path, implementation, passes
):
    monkeypatch.setitem(matrix.IMPLEMENTATIONS, "attention", (implementation,))
    record = tmp_path / "record.jsonl"
    arguments = (
        "--operator",
        "attention",
        "--case",
        "^window, 63",
        "--only",
        "float32",
        "--repeats",
        "7",
        "--record",
        str(record),
    )
    assert (run(monkeypatch, *arguments) is None) == passes
    (cell,) = map(json.loads, record.read_text().splitlines())
    assert cell["passed"] == passes and cell["repeats"] == 7


def test_every_pair_of_tokens_heads_and_rows_occurs():
    shapes = list(mesh_shapes(16384))
    for first, second in itertools.combinations(range(3), 2):
        seen = {(shape[first], shape[second]) for shape in shapes}
        assert seen == set(
            itertools.product(*({shape[i] for shape in shapes} for i in (first, second)))
        )
    tokens, heads, rows = map(set, zip(*shapes, strict=True))
    assert (tokens, heads, rows) == ({1024, 2048, 4096, 8192, 16384}, {16, 8, 4, 2}, {1, 2, 8})
    assert max(tokens for tokens, _, _ in mesh_shapes(5000)) == 4096


@pytest.mark.parametrize(
    "operator", [name for name in CASES if name not in ("projection", "short_conv")]
)
def test_every_operator_meets_keys_that_are_alike(operator):
    alike = [case for case in CASES[operator](1024) if "alike" in case.name]
    assert alike
    problem = next(case for case in alike if "1024" not in case.name).make()
    k = {
        "attention": lambda: problem.inputs["k"][0, :, 0],
        "gated_delta_rule": lambda: problem.inputs["k"][0, :, 0],
        "attention_step": lambda: problem.inputs["state"].k[0, :, 0],
        "gated_delta_rule_step": lambda: problem.inputs["inputs"][0].k[:, 0],
    }[operator]()
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    assert (k @ k.T).min() > 0.98


def test_a_record_is_gone_on_with(monkeypatch, capsys, tmp_path):
    record = tmp_path / "record.jsonl"
    arguments = (
        "--operator",
        "attention",
        "--case",
        "^window, (63|65)",
        "--only",
        "float32",
        "--record",
        str(record),
    )

    def wrong_at_65(q, *args, **kwargs):
        out, lse = xla.attention(q, *args, **kwargs)
        return out * (1 + (q.shape[1] == 65)), lse

    # Nothing begun, nothing wrong.
    assert run(monkeypatch, *arguments, "--minutes", "0", attention=xla.attention) == 3
    assert "2 cases are left" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, attention=wrong_at_65) == 1
    said = capsys.readouterr()
    assert "window, 65" in said.err and "window, 63" not in said.err
    assert run(monkeypatch, *arguments, attention=xla.attention) is None
    said = capsys.readouterr()
    assert "window, 65" in said.out and "window, 63" not in said.out  # only what failed ran again
    assert [json.loads(line)["passed"] for line in record.read_text().splitlines()] == [
        True,
        False,
        True,
    ]
    assert run(monkeypatch, *arguments, attention=wrong_at_65) is None  # all of it passed before


def test_what_raises_is_a_cell_that_fails(monkeypatch, capsys):
    def attention(q, *args, **kwargs):
        if q.shape[1] == 63:
            raise MemoryError("no room")
        return xla.attention(q, *args, **kwargs)

    assert (
        run(
            monkeypatch,
            "--operator",
            "attention",
            "--case",
            "^window, (63|65)",
            "--only",
            "float32",
            attention=attention,
        )
        == 1
    )
    wrong, right = capsys.readouterr().out.splitlines()[1:]
    assert "raised: MemoryError: no room" in wrong and "0.0" in right


def test_programs_are_compiled_ahead(monkeypatch, capsys):
    arguments = (
        "--operator",
        "attention",
        "--case",
        "^window, (63|65)",
        "--only",
        "xla",
        "--repeats",
        "2",
    )
    assert run(monkeypatch, *arguments, "--workers", "2") is None
    ahead = capsys.readouterr().out
    assert run(monkeypatch, *arguments) is None
    assert capsys.readouterr().out == ahead and len(ahead.splitlines()) == 5


@pytest.mark.parametrize(
    ("got", "want", "exact", "error"),
    [
        ([3.0, 4.5], [3.0, 4.0], None, 0.1),
        ([0.0, 0.5], [0.0, 0.0], None, 0.5**1.5),
        ([np.nan, 4.0], [3.0, 4.0], None, np.nan),
        ([-np.inf, 4.0], [-np.inf, 4.0], None, 0.0),
        ([1.0, 4.0], [-np.inf, 4.0], None, np.nan),
        ([0.0, 4.0], [-0.0, 4.0], [True, False], np.inf),
        ([0.0, 4.0], [-0.0, 4.0], [False, True], 0.0),
    ],
)
def test_errors_on_the_device(got, want, exact, error):
    got = jnp.asarray(got, jnp.float32)
    with jax.enable_x64(True):
        found, differs = judge(
            [got + 1],
            [got],
            [jnp.asarray(want, jnp.float64)],
            [exact if exact is None else np.asarray(exact)],
        )
    np.testing.assert_allclose(found, [error], rtol=1e-12)
    assert differs.tolist() == [True]


def test_equal_bits_are_what_counts():
    first, got = (jnp.asarray(x, jnp.bfloat16) for x in ([np.nan, 0.0], [np.nan, -0.0]))
    with jax.enable_x64(True):
        assert not judge([first], [first], [jnp.zeros(2, jnp.float64)], [None])[1].any()
        assert judge([first], [got], [jnp.zeros(2, jnp.float64)], [None])[1].all()


def test_shared_memory_is_poisoned_on_hopper_alone():
    class Hopper:
        platform, compute_capability, device_kind = "gpu", "9.0", "H100"

    texts = []
    for device in (Hopper, jax.devices()[0]):
        traced = jax.jit(disturb.work((100, 4096), device)).trace()
        texts.append(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert [text.count("@mosaic_gpu_v2") for text in texts] == [1, 0]
