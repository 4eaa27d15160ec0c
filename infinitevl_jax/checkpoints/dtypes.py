"""dtypes of weights: which are read, which holds several without loss, and exact narrowing."""

from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from infinitevl_jax.checkpoints.files import MANIFEST
from infinitevl_jax.errors import InfiniteVLError

FLOATS = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))


def common(dtypes: Sequence[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds all of these without loss: their own, or f32 where they
    differ."""
    return dtypes[0] if len(set(dtypes)) == 1 else np.dtype(np.float32)


def narrowed(value: np.ndarray, dtype: np.dtype, name: str, folder: Path) -> np.ndarray:
    """`value` in the dtype that the manifest of `folder` gives the tensor `name`; InfiniteVLError
    if it loses digits."""
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        out = value.astype(dtype)
    if not np.array_equal(out.astype(value.dtype), value):
        raise InfiniteVLError(
            f"{folder / MANIFEST} says that {name} is {dtype}, which cannot hold the values that"
            " are stored for it",
            "the manifest is damaged or belongs to other weights: import or save the model again",
        )
    return out
