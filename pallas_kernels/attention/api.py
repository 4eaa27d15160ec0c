"""The contract of attention and of its one-token step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.state import KVCache

RESIDUAL_NAMES = ("attention_out", "attention_lse")
"""Names for remat policies, the same in every implementation: the residuals of the backward pass
besides the inputs."""


def attention(
    q: Array,
    k: Array,
    v: Array,
    q_token_index: Array | None = None,
    k_token_index: Array | None = None,
    q_segment_ids: Array | None = None,
    k_segment_ids: Array | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Softmax attention over the keys that `mask` makes visible, and the log-sum-exp of the scores.

    Args:
        q: [B, Tq, Hq, D]. Query head h reads key head h // (Hq / Hkv).
        k: [B, Tk, Hkv, D].
        v: [B, Tk, Hkv, Dv].
        q_token_index: [B, Tq] int, the order of each token in its sequence; -1 marks a pad. None:
            row t is token t. Pads may hold anything.
        k_token_index: [B, Tk] int, likewise.
        q_segment_ids: [B, Tq] int. Tokens of different segments do not see each other. Both None:
            one segment.
        k_segment_ids: [B, Tk] int.
        mask: which keys a query sees. None: `Mask()`, causal.
        scale: factor of the scores. None: D ** -0.5.
        implementation: a name, or several in order ("mosaic_gpu,xla"). None: the first that can
            run.

    Returns:
        out [B, Tq, Hq, Dv] in the dtype of q, and lse [B, Tq, Hq] in float32. A query that is a pad
        or sees no key gives out 0 and lse -inf. Both are differentiable in q, k and v. Softmax and
        sums are float32. Products of float32 inputs are in full float32, those of narrower inputs
        in the inputs' dtype.

    Raises ValueError for shapes that do not fit together, segments on one side only, or an aligned
    mask over Tq != Tk; Refusal where no allowed implementation takes the call.
    """
    from pallas_kernels.attention.implementations import ATTENTION  # imports the kernels' compilers

    call = complete(
        q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale
    )
    return ATTENTION(*call, implementation=implementation)


def attention_step(
    q: Array,
    k: Array,
    v: Array,
    kv_cache: KVCache,
    token_index: Array,
    window: int | None = None,
    scale: float | None = None,
    sinks: int = 0,
    *,
    implementation: str | None = None,
) -> tuple[Array, KVCache]:
    """Attention of one new token of each sequence to itself and the cached tokens. Adds the new
    token to the cache.

    `pallas_kernels.attention.step.step` gives arguments and results. implementation: as for
    `attention`.
    """
    from pallas_kernels.attention.implementations import ATTENTION_STEP

    return ATTENTION_STEP(
        q, k, v, kv_cache, token_index, window, scale, sinks, implementation=implementation
    )


class Call(NamedTuple):
    """All arguments of `attention`, with the defaults filled in."""

    q: Array
    k: Array
    v: Array
    q_token_index: Array
    k_token_index: Array
    q_segment_ids: Array | None
    k_segment_ids: Array | None
    mask: Mask
    scale: float


def complete(
    q,
    k,
    v,
    q_token_index=None,
    k_token_index=None,
    q_segment_ids=None,
    k_segment_ids=None,
    mask=None,
    scale=None,
) -> Call:
    """The arguments of `attention` with defaults; raises ValueError where `attention` does."""
    mask = Mask() if mask is None else mask
    check(q, k, v, q_segment_ids, k_segment_ids, mask)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    q_token_index, k_token_index = (
        (
            jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
            if index is None
            else index
        )
        for x, index in ((q, q_token_index), (k, k_token_index))
    )
    return Call(q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale)


def arguments(*args, **kwargs) -> dict:
    """`complete`, by name."""
    return complete(*args, **kwargs)._asdict()


def step_arguments(q, k, v, kv_cache, token_index, window=None, scale=None, sinks=0) -> dict:
    """The arguments of `attention_step` by name, with defaults."""
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    return {
        "q": q, "k": k, "v": v, "kv_cache": kv_cache, "token_index": token_index,
        "window": window, "scale": scale, "sinks": sinks,
    }  # fmt: skip


def check(
    q: jax.Array, k: jax.Array, v: jax.Array, q_segment_ids, k_segment_ids, mask: Mask
) -> None:
    """Raises ValueError where `attention` does."""
    if not k.shape[2] or q.shape[2] % k.shape[2] or k.shape[2] != v.shape[2]:
        heads = f"{q.shape[2]} query heads, {k.shape[2]} key heads and {v.shape[2]} value heads"
        raise ValueError(
            f"attention: {heads}\n  -> key and value heads must be equal and divide the query heads"
        )
    if q.shape[3] != k.shape[3]:
        widths = f"queries {q.shape[3]} wide, keys {k.shape[3]}"
        raise ValueError(f"attention: {widths}\n  -> their product is the score: give equal widths")
    if k.shape[1] != v.shape[1] or not q.shape[0] == k.shape[0] == v.shape[0]:
        shapes = f"q {list(q.shape[:2])}, k {list(k.shape[:2])} and v {list(v.shape[:2])}"
        raise ValueError(
            f"attention: batch and length are {shapes}\n  -> one batch size, and a value for"
            " each key"
        )
    if (q_segment_ids is None) != (k_segment_ids is None):
        raise ValueError(
            "attention: segments given on one side only\n  -> give q_segment_ids and k_segment_ids,"
            " or neither"
        )
    if mask.aligned and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"attention: aligned mask, but {q.shape[1]} queries and {k.shape[1]} keys\n  ->"
            " aligned=False"
        )
