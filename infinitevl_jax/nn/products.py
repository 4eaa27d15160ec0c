"""Products of activations with weights: their precision, and those of one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from infinitevl_jax.nn.ops import Ops

if TYPE_CHECKING:
    from infinitevl_jax.nn.layers import RMSNorm


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """HIGHEST for float32 and wider, which rules out TF32 and bf16 passes; else the default."""
    return jax.lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


def project(
    ops: Ops,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    norm: RMSNorm | None = None,
    residual: Array | None = None,
    transposed: bool = False,
    prefetch: Array | None = None,
) -> Array:
    """residual + gated(norm(x) @ weight + bias) for one token of each sequence, by the operator
    `projection`.

    Args:
      x, residual: [batch, 1, width].
      weight, bias, transposed, prefetch: as for `pallas_kernels.projection.projection`.

    Returns:
      [batch, 1, columns].
    """
    given = {} if norm is None else {"norm": norm.weight[...], "eps": norm.eps}
    given |= {} if bias is None else {"bias": bias}
    given |= {} if residual is None else {"residual": residual[:, 0]}
    given |= {} if prefetch is None else {"prefetch": prefetch}
    return ops.projection(x[:, 0], weight, transposed=transposed, **given)[:, None]
