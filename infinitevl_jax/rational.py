"""Times as exact fractions: a floored quotient must not depend on how a float was rounded."""

import math
from fractions import Fraction
from numbers import Rational

import numpy as np


def exact(value: float | Rational | np.floating) -> Fraction:
    """The simplest fraction that rounds to `value`: 1/3 for 0.333..., in float64 or in float32.

    Fractions whose denominators have at most half of the type's bits are told apart by their
    floats, so that what was such a fraction before it was rounded comes back unchanged.

    Raises:
      ValueError: the value is not finite. TypeError: it is no number.
    """
    if isinstance(value, Rational):
        return Fraction(value)
    kind = type(value) if isinstance(value, np.floating) else np.float64
    if not math.isfinite(value):
        raise ValueError(f"{value} is not finite")
    found = Fraction(float(value))
    simple = found.limit_denominator(1 << np.finfo(kind).nmant // 2)
    return simple if kind(float(simple)) == value else found
