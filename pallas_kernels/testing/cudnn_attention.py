"""Attention by cuDNN's flash kernels, as `jax.nn.dot_product_attention` calls them, for comparison.

It follows the contract of `attention` for one sequence a row. A model cannot use it, because its
calls have segments. It was not faster than the Hopper kernels at 4K to 128K tokens
(benchmarks/results/attend.jsonl).

JAX returns cuDNN's log-sum-exp as bfloat16, too coarse for merging. The log-sum-exp returned here
and its gradients are those of `xla.attention`; where it is unused, it is not computed. Under
rematerialisation the forward pass runs again, because the residuals of cuDNN's backward pass have
no name.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.attention import xla
from pallas_kernels.attention.api import complete
from pallas_kernels.attention.mask import Mask
from pallas_kernels.dispatch import Implementation
from pallas_kernels.hardware import ampere


def supports(
    q: jax.Array, k: jax.Array, v: jax.Array, *__, q_segment_ids=None, mask: Mask, **_
) -> str | None:
    """Returns the reason it does not take these arrays (or shapes with dtypes), else None."""
    if not mask.aligned:
        return "keys other than the queries' own"
    if q_segment_ids is not None:
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


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_token_index: jax.Array | None = None,
    k_token_index: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    k_segment_ids: jax.Array | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    implementation: str = "cudnn",
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.attention.attention`. Raises ValueError where `supports`
    gives a reason.

    implementation: "xla" makes `jax.nn` compute the same call without cuDNN, for tests on other
    devices.
    """
    call = complete(
        q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale
    )
    if reason := supports(**call._asdict()):
        raise ValueError(
            f"attention by cuDNN does not take {reason}\n  -> use the implementation xla"
        )
    q_token_index, mask, scale = call.q_token_index, call.mask, call.scale
    _, lse = xla.attention(*call)
    real = (q_token_index >= 0)[:, :, None, None]
    count = jnp.sum(q_token_index >= 0, axis=1, dtype=jnp.int32)
    run = partial(
        jax.nn.dot_product_attention,
        is_causal=mask.causal,
        scale=scale,
        implementation=implementation,
    )
    window = None if mask.window is None else (mask.window - 1, 0)
    length, odd = q.shape[1], q.shape[1] % 2  # of odd lengths it gives no gradients
    q, k, v = (
        jnp.pad(jnp.where(real, x, 0), [(0, 0), (0, odd), (0, 0), (0, 0)]) for x in (q, k, v)
    )
    out = run(
        q, k, v, query_seq_lengths=count, key_value_seq_lengths=count, local_window_size=window
    )
    return jnp.where(real, out[:, :length], 0), lse


CUDNN = Implementation("cudnn", attention, ampere, supports, unordered=("d_q",))
