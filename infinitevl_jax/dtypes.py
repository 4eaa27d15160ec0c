"""Which dtype a model computes in."""

import jax.numpy as jnp
import numpy as np

from infinitevl_jax.errors import InfiniteVLError


def compute_dtype(stored) -> np.dtype:
    """The dtype to compute in for weights that are stored so: their own, float32 for float16, whose
    range activations leave."""
    return jnp.dtype("float32" if stored == jnp.float16 else stored)


def floating(dtype) -> np.dtype | None:
    """f32 or bf16 as a numpy dtype, from a name or a dtype of numpy, jax or torch; None for None
    and "auto"."""
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
