"""Compute dtypes."""

import jax.numpy as jnp
import numpy as np

from infinitevl_jax.errors import InfiniteVLError


def compute_dtype(stored) -> np.dtype:
    """The stored dtype, or float32 for float16, which activations overflow."""
    return jnp.dtype("float32" if stored == jnp.float16 else stored)


def floating(dtype) -> np.dtype | None:
    """float32 or bfloat16 from a name or a numpy, jax or torch dtype; None for None and "auto"."""
    name = (
        str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else np.dtype(dtype).name
    )
    if name in ("None", "auto"):
        return None
    if name not in ("float32", "bfloat16"):
        raise InfiniteVLError(
            f"dtype is {dtype!r}",
            "compute in float32 or bfloat16, or leave it out to keep the checkpoint's own",
        )
    return jnp.dtype(name)
