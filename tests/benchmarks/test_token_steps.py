"""What the benchmark of token steps times has been checked, the layers' own operations too."""

import pytest

from benchmarks import decode


@pytest.mark.parametrize("op", decode.LAYERS)
def test_errors(op):
    found = decode.errors(op, "layers", 3)
    assert 0 < found["out"] <= 5e-3
    assert not any(error for name, error in found.items() if name not in ("out", "recurrent_state"))


def test_what_is_wrong_is_not_timed(monkeypatch):
    def wrong(*args, **rule):
        out, state = decode.delta_layers(*args, **rule)
        return 1.01 * out, state

    monkeypatch.setitem(decode.IMPLEMENTATIONS["gated_delta_rule"], "wrong", wrong)
    with pytest.raises(ValueError, match="not timed: .*of what is allowed out"):
        decode.errors("gated_delta_rule", "wrong", 1)
