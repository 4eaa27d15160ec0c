import math
from fractions import Fraction

import numpy as np
import pytest

from infinitevl_jax.rational import exact


@pytest.mark.parametrize("kind", [float, np.float64, np.float32])
def test_a_rounded_fraction_comes_back(kind):
    for below in (1, 2, 3, 7, 24, 30, 125, 1001):
        for above in range(1, 3 * below, 5):
            assert exact(kind(above / below)) == Fraction(above, below)


def test_what_is_no_simple_fraction_keeps_its_value():
    value = math.pi
    assert float(exact(value)) == value
    assert exact(0.99999999) < 1 < exact(1.00000001)
    assert exact(Fraction(10**30, 3)) == Fraction(10**30, 3) and exact(7) == 7
    assert exact(1e30) == Fraction(1e30) and float(exact(5e-324)) == 5e-324


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_infinity_and_nan_are_no_fractions(value):
    with pytest.raises(ValueError, match="not finite"):
        exact(value)
