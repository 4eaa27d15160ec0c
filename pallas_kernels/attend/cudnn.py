"""Attention by cuDNN's flash kernels, as `jax.nn.dot_product_attention` calls them: the contract of `attend` for one sequence a row.

JAX hands back cuDNN's log-sum-exp as bfloat16, two decimals of what merging needs. The one returned here is `xla.attend`'s, and so are its
gradients; where nobody uses it (training, and any call without cached keys), it is not computed. Under rematerialisation the forward pass
runs again: what cuDNN's backward pass keeps has no name to keep it by.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.attend import xla
from pallas_kernels.attend.check import check
from pallas_kernels.attend.mask import Mask


def supports(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, segments: bool = False) -> str | None:
    """Why these arrays (or shapes with dtypes) are not for this implementation, or None if they are."""
    if not mask.aligned:
        return "keys other than the queries' own"
    if segments:
        return "packed segments"
    if q.shape[1] == 1:
        return "a single query"
    if mask.window is not None and (mask.sinks or not mask.causal):
        return "a window with sinks, or on both sides"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtypes {q.dtype}, {k.dtype} and {v.dtype}: bfloat16 or float16, equal"
    if q.shape[3] % 8 or q.shape[3] > 128 or v.shape[3] != q.shape[3]:
        return f"head widths {q.shape[3]} and {v.shape[3]}: a multiple of 8, at most 128, equal"
    if not all(q.shape[:2]):
        return "no tokens"
    return None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_index: jax.Array,
    k_index: jax.Array,
    q_segment: jax.Array | None,
    k_segment: jax.Array | None,
    mask: Mask,
    scale: float,
    implementation: str = "cudnn",
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.attend.attend`; raises ValueError where `check` does or `supports` objects.

    implementation: "xla" has `jax.nn` make the same call without cuDNN, for tests on other devices.
    """
    check(q, k, v, q_segment, k_segment, mask)
    if reason := supports(q, k, v, mask, q_segment is not None):
        raise ValueError(f"attend by cuDNN does not take {reason}\n  -> use the implementation xla")
    _, lse = xla.attend(q, k, v, q_index, k_index, None, None, mask, scale)
    real = (q_index >= 0)[:, :, None, None]
    count = jnp.sum(q_index >= 0, axis=1, dtype=jnp.int32)
    run = partial(jax.nn.dot_product_attention, is_causal=mask.causal, scale=scale, implementation=implementation)
    window = None if mask.window is None else (mask.window - 1, 0)
    length, odd = q.shape[1], q.shape[1] % 2  # of odd lengths it gives no gradients
    q, k, v = (jnp.pad(jnp.where(real, x, 0), [(0, 0), (0, odd), (0, 0), (0, 0)]) for x in (q, k, v))
    out = run(q, k, v, query_seq_lengths=count, key_value_seq_lengths=count, local_window_size=window)
    return jnp.where(real, out[:, :length], 0), lse
