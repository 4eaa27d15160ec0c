"""Times as exact fractions, so that floored quotients do not depend on float rounding."""

import math
from fractions import Fraction
from numbers import Rational

import numpy as np


def exact(value: float | Rational | np.floating) -> Fraction:
    """The simplest fraction that rounds to `value`, such as 1/3 for 0.333... (float64 or float32).

    A fraction whose denominator has at most half of the type's bits survives rounding to a float
    and back.

    Raises:
      ValueError: the value is not finite.
      TypeError: the value is not a number.
    """
    if isinstance(value, Rational):
        return Fraction(value)
    kind = type(value) if isinstance(value, np.floating) else np.float64
    if not math.isfinite(value):
        raise ValueError(f"{value} is not finite")
    found = Fraction(float(value))
    simple = found.limit_denominator(1 << np.finfo(kind).nmant // 2)
    return simple if kind(float(simple)) == value else found
