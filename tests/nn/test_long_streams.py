"""What may not drift over a long stream: the recurrent state, and rotary angles far from 0."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.drift import drift
from infinitevl_jax.nn.rope import decoder_angles


def test_the_state_does_not_drift():
    """20,000 tokens; `python -m benchmarks.drift` goes to a million."""
    errors = list(drift(20_000))
    assert errors[-1]["tokens"] == 20_000
    assert max(max(found["state"], found["out"]) for found in errors) <= 1e-4  # fails for NaN too


@pytest.mark.parametrize("theta", [1e6, 1e4, 1.5])
def test_angles_at_far_positions(theta):
    """Within 1e-6 of float64 less whole turns, at all that int32 counts."""
    rng = np.random.default_rng(0)
    far = [rng.integers(0, top, 1000) for top in (3000, 10**7, 2**31 - 1)]
    positions = np.concatenate([*far, [0, 10**7, 2**31 - 1]]).astype(np.int32)
    found = decoder_angles(jnp.asarray(positions)[None, None], 64, theta, None)
    exact = positions[:, None] * np.float64(theta) ** -(np.arange(32) / 32)
    turns = (exact - np.float64(found[0])) / (2 * np.pi)
    assert np.abs(turns - np.round(turns)).max() * 2 * np.pi <= 1e-6
    assert np.abs(found).max() <= 3.1416


def test_each_axis_turns_its_own_frequencies():
    positions = jnp.asarray([5, 7, 11])[:, None, None]
    found = decoder_angles(positions, 16, 1e4, (2, 3, 3))[0, 0]
    frequency = 1e4 ** -(np.arange(8) / 8)
    wanted = np.repeat([5, 7, 11], [2, 3, 3]) * frequency
    np.testing.assert_allclose(found, (wanted + np.pi) % (2 * np.pi) - np.pi, atol=1e-6)
