"""Attention on Hopper GPUs (H100, H200), by Mosaic GPU kernels.

The kernels take one contiguous range of key rows for each query. With an aligned mask each query
sees such a range, for any mix of causal order, window, packed segments and pads. With a causal mask
over cached keys it does once the keys are sorted by token index. Measurements and comparisons with
other libraries: benchmarks/results/attend.jsonl.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import xla
from pallas_kernels.attention.api import complete
from pallas_kernels.attention.hopper import backward, forward
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.merge import merge
from pallas_kernels.attention.tuning import HopperForward as Tuning
from pallas_kernels.attention.visible_ranges import cached_visible_ranges, visible_ranges
from pallas_kernels.hardware import HOPPER_MULTIPROCESSORS

BLOCK = 128  # lengths are padded to a multiple of this
WIDTHS = 64, 128  # heads are filled up to one of these


def supports(
    q: jax.Array, k: jax.Array, v: jax.Array, *_, q_segment_ids=None, mask: Mask, scale: float, **__
) -> str | None:
    """Returns the reason it does not take these arrays (or shapes with dtypes), else None."""
    if not mask.aligned and (q_segment_ids is not None or not mask.causal):
        return (
            "keys other than the queries' own, and these with packed segments or a mask that is not"
            " causal"
        )
    if q.shape[1] == 1:
        return "a single query, which fills no block"
    if mask.sinks and mask.window is not None:
        return "sinks outside the window"
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        return f"dtypes {q.dtype}, {k.dtype} and {v.dtype}: bfloat16 only"
    if max(q.shape[3], v.shape[3]) > WIDTHS[-1]:
        return f"head widths {q.shape[3]} and {v.shape[3]}: at most {WIDTHS[-1]}"
    if not scale > 0:
        return f"scale {scale}: positive only"
    if not all((*q.shape, k.shape[1])):
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
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.attention.attention`.

    With an aligned mask, token indices only say which tokens are pads. Heads are padded with zeros
    to 64 or 128, for gradients always to 128. Gradients with cached keys are those of
    `xla.attention` (`gradients_by` says so). Raises ValueError where `complete` does or `supports`
    gives a reason.
    """
    call = complete(
        q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale
    )
    if reason := supports(**call._asdict()):
        raise ValueError(
            f"attention on Hopper does not take {reason}\n  -> use the implementation xla"
        )
    width = next(n for n in WIDTHS if max(q.shape[3], v.shape[3]) <= n)
    wide = (_widen(x, width) for x in call[:3])
    out, lse = _attention(*wide, *call[3:])
    return out[..., : v.shape[3]], lse


def gradients_by(*_, mask: Mask, **__) -> str | None:
    """The implementation that computes the gradients, None for this one."""
    return None if mask.aligned else "xla"


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale):
    return _forward(
        q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale
    )[0]


def _forward(q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale):
    length, keys = q.shape[1], (k, _erase(v, k_token_index))
    if mask.aligned:
        first, last, _, _ = visible_ranges(q_token_index, q_segment_ids, mask)
    else:
        first, last = cached_visible_ranges(q_token_index, k_token_index, mask)
        order = jnp.argsort(k_token_index, axis=1)[:, :, None, None]
        keys = tuple(jnp.take_along_axis(x, order, axis=1) for x in keys)
    rows = pad_to_blocks((q, *keys), 0) + (pad_to_blocks(first, 0), pad_to_blocks(last, -1))
    parts = 1 if mask.aligned else key_parts(rows[0].shape, rows[1].shape[1])
    out, lse = _forward_in_parts(*rows, scale, parts)
    out, lse = out[:, :length], lse[:, :length]
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (
        q,
        k,
        v,
        q_token_index,
        k_token_index,
        q_segment_ids,
        k_segment_ids,
        out,
        lse,
    )


def key_parts(queries: tuple[int, ...], keys: int) -> int:
    """Parts of the keys that are attended to side by side, where few queries [B, T, Hq, D] would
    leave multiprocessors idle: 1, 2, 4 or 8. A row's bits depend on it, and so on the batch."""
    batch, length, heads, _ = queries
    blocks, parts = batch * heads * length // BLOCK, 1
    while (
        2 * parts * blocks <= HOPPER_MULTIPROCESSORS
        and keys % (2 * parts * Tuning.keys) == 0
        and keys // (2 * parts) >= Tuning.part
        and parts < 8
    ):
        parts *= 2
    return parts


def _forward_in_parts(q, k, v, first, last, scale: float, parts: int):
    """out [B, T, Hq, D] and lse [B, T, Hq] of arguments as for `forward.forward`."""
    if parts == 1:
        out, lse = forward.forward(q, k, v, first, last, scale)
        return out, lse.swapaxes(1, 2)
    batch, keys = k.shape[0], k.shape[1] // parts
    starts = jnp.arange(parts, dtype=jnp.int32)[:, None] * keys

    def repeat(x):
        return jnp.repeat(x, parts, axis=0)

    def split(x):
        return x.reshape(batch * parts, keys, *x.shape[2:])

    first = jnp.maximum(first[:, None] - starts, 0).reshape(-1, first.shape[1])
    last = jnp.minimum(last[:, None] - starts, keys - 1).reshape(-1, last.shape[1])
    out, lse = forward.forward(repeat(q), split(k), split(v), first, last, scale)
    out, lse = (x.reshape(batch, parts, *x.shape[1:]) for x in (out, lse.swapaxes(1, 2)))
    merged = out[:, 0].astype(jnp.float32), lse[:, 0]
    for part in range(1, parts):
        merged = merge(*merged, out[:, part], lse[:, part])
    return merged[0].astype(q.dtype), merged[1]


def _backward(mask, scale, kept, cotangents):
    q, k, v, q_token_index, k_token_index, q_segment_ids, _, out, lse = kept
    if gradients_by(mask=mask) == "xla":
        return xla.backward(mask, scale, kept, cotangents)
    length, width = q.shape[1], q.shape[3]
    d_out, d_lse = cotangents
    live = lse != -jnp.inf
    d_out = jnp.where(live[..., None], d_out, 0)
    shift = jnp.where(live, jnp.sum(d_out.astype(jnp.float32) * out, axis=-1) - d_lse, 0)
    lse = jnp.where(live, lse, 0)
    _, _, first, last = visible_ranges(q_token_index, q_segment_ids, mask)
    rows = _erase(q, q_token_index), _erase(k, k_token_index), _erase(v, k_token_index), d_out
    rows = pad_to_blocks(tuple(_widen(x, backward.WIDTH) for x in rows), 0)
    rows += tuple(pad_to_blocks(x, 0).swapaxes(1, 2) for x in (lse, shift)) + (
        pad_to_blocks(first, 0),
        pad_to_blocks(last, -1),
    )
    gradients = backward.backward(*rows, scale)
    return *(x[:, :length, :, :width].astype(q.dtype) for x in gradients), None, None, None, None


_attention.defvjp(_forward, _backward)


def _erase(x: jax.Array, token_index: jax.Array) -> jax.Array:
    """Zeros in the rows of pads: a weight of 0 does not remove a NaN."""
    return jnp.where(token_index[:, :, None, None] >= 0, x, 0)


def _widen(x: jax.Array, width: int) -> jax.Array:
    """Heads filled up with zeros, which add nothing to scores."""
    return x if x.shape[3] == width else jnp.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[3])])


def pad_to_blocks(tree, value):
    def pad(x):
        widths = [(0, 0), (0, -x.shape[1] % BLOCK)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value)

    return jax.tree.map(pad, tree)
