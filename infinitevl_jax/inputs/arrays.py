"""Reads what a caller passes: numpy, jax or torch arrays and nested lists become numpy arrays of a
declared kind and range."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from infinitevl_jax.errors import InfiniteVLError

INT32_MAX = 2**31 - 1  # counters and positions are int32 on the device


def as_numpy(value: Any, name: str) -> np.ndarray:
    """Any array of numbers as numpy; 16-bit floats become float32, which is exact.

    name: what errors call the value. Raises InfiniteVLError for anything but an array of numbers:
      text, rows of unequal length, traced values.
    """
    try:
        if isinstance(value, list | tuple) and any(_is_torch(item) for item in value):
            value = [as_numpy(item, name) for item in value]
        if _is_torch(value):
            value = value.detach().cpu()
            # numpy has no bfloat16 and no float8
            value = (
                value.float() if value.is_floating_point() and value.element_size() < 4 else value
            ).numpy()
        array = np.asarray(value)
        if array.dtype.kind == "V" or (
            array.dtype.kind == "f" and array.dtype.itemsize < 4
        ):  # V: ml_dtypes' bfloat16
            array = array.astype(np.float32)
    except Exception as error:  # whatever the library behind the value raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InfiniteVLError(
            f"{name} is a {type(value).__name__} that cannot be read as an array: {reason}",
            "pass a numpy, jax or torch array, or lists of numbers of equal length",
        ) from None
    if array.dtype.kind not in "biuf":
        raise InfiniteVLError(
            f"{name} has dtype {array.dtype}, which holds no real numbers",
            "pass an array of numbers, as the processor returns it",
        )
    return array


def integers(
    value: Any, name: str, axes: Sequence[str], low: int, high: int, cure: str = ""
) -> np.ndarray:
    """An array of whole numbers from low to high, of rank len(axes), as int64.

    Raises InfiniteVLError for another dtype (floats too, which may have fractions), another rank,
    or a value out of range.
    """
    array, shape = as_numpy(value, name), f"[{', '.join(axes)}]"
    if array.dtype.kind not in "iu" or array.ndim != len(axes):
        raise InfiniteVLError(
            f"{name} has shape {array.shape} and dtype {array.dtype}", f"pass integers {shape}"
        )
    if array.size and (array.min() < low or array.max() > high):
        culprit = int(array.min() if array.min() < low else array.max())
        raise InfiniteVLError(f"{name} holds {culprit}", cure or f"values go from {low} to {high}")
    return array.astype(np.int64)


def floats(
    value: Any, name: str, low: float = -np.inf, high: float = np.inf, cure: str = ""
) -> np.ndarray:
    """An array of finite floats from low to high, of any shape, in its own width (float32 at
    least)."""
    array = as_numpy(value, name)
    if array.dtype.kind == "b":
        raise InfiniteVLError(f"{name} has dtype {array.dtype}", "pass floating-point numbers")
    bad = ~np.isfinite(array)
    if np.isfinite(low) or np.isfinite(high):  # one pass over pixels is enough
        bad |= (array < low) | (array > high)
    if bad.any():
        where = [int(i) for i in np.argwhere(bad)[0]]
        value = "NaN" if np.isnan(array[tuple(where)]) else array[tuple(where)]
        raise InfiniteVLError(
            f"{name} {array.shape} holds {value} at {where}", cure or "check what made them"
        )
    return array


def whole_number(value: Any, name: str, low: int, high: int = INT32_MAX) -> int:
    """One whole number (Python's, numpy's, or a 0-d array) from low to high; InfiniteVLError for
    anything else, True included."""
    number = _scalar(value)
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        raise InfiniteVLError(f"{name} is {value!r}", f"pass a whole number from {low} to {high}")
    return number


def number(value: Any, name: str, low: float, high: float, cure: str) -> float:
    """One finite number from low to high; InfiniteVLError for anything else."""
    found = _scalar(value)
    if (
        isinstance(found, bool)
        or not isinstance(found, int | float)
        or not low <= found <= high
        or abs(found) == np.inf
    ):
        raise InfiniteVLError(f"{name} is {value!r}", cure)
    return float(found)


def _scalar(value: Any) -> Any:
    if (
        _is_torch(value)
        or isinstance(value, np.generic)
        or (hasattr(value, "dtype") and hasattr(value, "ndim"))
    ):
        array = as_numpy(value, "a number")
        return array.item() if array.ndim == 0 else value
    return value


def _is_torch(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "is_floating_point")
