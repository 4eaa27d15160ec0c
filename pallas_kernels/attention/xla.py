"""Attention in blocks with one pass over the keys, forward and backward, in plain XLA: runs on
every backend.

Each step computes softmax attention between a slice of the queries and a slice of the keys, and
merges it into the result of the earlier steps. No score outlives its step: memory is linear in
length, and so is time under a window. The backward pass recomputes the scores from the saved
log-sum-exp (Dao et al., FlashAttention-2, arXiv 2307.08691).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention.api import complete
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.merge import merge
from pallas_kernels.attention.xla_blocks import Plan, plan


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
    """The contract of `pallas_kernels.attention.attention`."""
    call = complete(
        q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale
    )
    if not (q.size and k.size):
        return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype), jnp.full(
            q.shape[:3], -jnp.inf, jnp.float32
        )
    return _attention(*call)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _attention(q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale):
    return _forward(
        q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale
    )[0]


def _forward(q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, mask, scale):
    steps = plan(q.shape[1], k.shape[1], mask, q_segment_ids is not None)
    queries = _pad((_by_group(q, k), q_token_index, q_segment_ids), 0, steps.q_total)
    keys = _pad((k, v, k_token_index, k_segment_ids), steps.k_front, steps.k_total)

    def tile(queries, keys):
        q, q_token_index, q_segment_ids = _split(queries, steps)
        k, v, k_token_index, k_segment_ids = _gather(keys, steps)
        seen = mask.visible(q_token_index, k_token_index, q_segment_ids, k_segment_ids)
        return _join(_softmax(q, k, _erase(v, k_token_index), seen, scale), steps)

    def step(found, start):
        here = _cut(found, start[0], steps.q_rows)
        more = tile(_cut(queries, start[0], steps.q_rows), _cut(keys, start[1], steps.k_rows))
        return _paste(found, merge(*here, *more), start[0]), None

    if len(steps.starts) == 1:
        out, lse = tile(queries, keys)
    else:
        rows = queries[0].shape[:-1]
        nothing = _filled(queries[0], 0, (*rows, v.shape[-1])), _filled(queries[0], -jnp.inf, rows)
        (out, lse), _ = lax.scan(step, nothing, jnp.asarray(steps.starts))
    out = out[:, : q.shape[1]].reshape(*q.shape[:3], v.shape[-1]).astype(q.dtype)
    lse = lse[:, : q.shape[1]].reshape(q.shape[:3])
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


def backward(mask, scale, kept, cotangents):
    q, k, v, q_token_index, k_token_index, q_segment_ids, k_segment_ids, out, lse = kept
    d_out, d_lse = cotangents
    # Queries that saw no key have no gradient, whatever their rows hold.
    live = lse != -jnp.inf
    d_out = jnp.where(live[..., None], d_out, 0)
    # d score = p (d p - sum(out * d out) + d lse). The last two terms are one number a row.
    shift = jnp.where(live, jnp.sum(d_out.astype(jnp.float32) * out, axis=-1) - d_lse, 0)
    lse = jnp.where(live, lse, 0)

    steps = plan(q.shape[1], k.shape[1], mask, q_segment_ids is not None)
    queries = (
        *(_by_group(x, k) for x in (_erase(q, q_token_index), d_out, lse, shift)),
        q_token_index,
        q_segment_ids,
    )
    queries = _pad(queries, 0, steps.q_total)
    keys = _pad((k, v, k_token_index, k_segment_ids), steps.k_front, steps.k_total)

    def tile(queries, keys):
        q, d_out, lse, shift, q_token_index, q_segment_ids = _split(queries, steps)
        k, v, k_token_index, k_segment_ids = _gather(keys, steps)
        seen = mask.visible(q_token_index, k_token_index, q_segment_ids, k_segment_ids)
        k, v = _erase(k, k_token_index), _erase(v, k_token_index)
        d_q, *d_kv = _softmax_backward(q, k, v, seen, scale, d_out, lse, shift)
        return _join(d_q, steps), tuple(_scatter(x, steps) for x in d_kv)

    def step(sums, start):
        here = _cut(sums[0], start[0], steps.q_rows), _cut(sums[1], start[1], steps.k_rows)
        more = tile(_cut(queries, start[0], steps.q_rows), _cut(keys, start[1], steps.k_rows))
        d_q, d_kv = jax.tree.map(jnp.add, here, more)
        return (_paste(sums[0], d_q, start[0]), _paste(sums[1], d_kv, start[1])), None

    if len(steps.starts) == 1:
        d_q, d_kv = tile(queries, keys)
    else:
        nothing = _filled(queries[0], 0), tuple(_filled(x, 0) for x in keys[:2])
        (d_q, d_kv), _ = lax.scan(step, nothing, jnp.asarray(steps.starts))
    d_q = d_q[:, : q.shape[1]].reshape(q.shape).astype(q.dtype)
    d_k, d_v = (
        x[:, steps.k_front :][:, : k.shape[1]].astype(y.dtype)
        for x, y in zip(d_kv, (k, v), strict=True)
    )
    return d_q, d_k, d_v, None, None, None, None


_attention.defvjp(_forward, backward)


# One tile. Letters: b batch (times blocks), t queries, s keys, h key heads, g query heads of each,
# d and e widths.


def _softmax(q, k, v, seen, scale):
    """Dense attention: out [b, t, h, g, e] and lse [b, t, h, g], float32."""
    scores = _scores(q, k, seen, scale)  # [b, h, t, g, s]
    top = jnp.max(scores, axis=-1, initial=-jnp.inf)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(scores - top[..., None])
    total = jnp.sum(weights, axis=-1)
    out = _product("bhtgs,bshe->bhtge", weights.astype(v.dtype), v)
    out = out / jnp.where(total == 0, 1, total)[..., None]
    return out.swapaxes(1, 2), (top + jnp.log(total)).swapaxes(1, 2)


def _softmax_backward(q, k, v, seen, scale, d_out, lse, shift):
    """Gradients of q, k and v, float32, from d_out [b, t, h, g, e] and the row numbers lse and
    shift [b, t, h, g]."""
    lse, shift = (x.swapaxes(1, 2)[..., None] for x in (lse, shift))
    weights = jnp.exp(_scores(q, k, seen, scale) - lse)  # [b, h, t, g, s], 0 where unseen
    d_v = _product("bhtgs,bthge->bshe", weights.astype(d_out.dtype), d_out)
    d_scores = weights * (_product("bthge,bshe->bhtgs", d_out, v) - shift) * scale
    d_q = _product("bhtgs,bshd->bthgd", d_scores.astype(k.dtype), k)
    d_k = _product("bhtgs,bthgd->bshd", d_scores.astype(q.dtype), q)
    return d_q, d_k, d_v


def _scores(q, k, seen, scale):
    scores = _product("bthgd,bshd->bhtgs", q, k) * scale
    return jnp.where(seen[:, None, :, None, :], scores, -jnp.inf)


def _product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    wide = jnp.promote_types(a.dtype, b.dtype) == jnp.float32
    precision = lax.Precision.HIGHEST if wide else lax.Precision.DEFAULT
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


# Moves between whole arrays, steps and tiles, on axis 1 of every array of a tree.


def _by_group(x: jax.Array, k: jax.Array) -> jax.Array:
    """[b, t, query heads, ...] -> [b, t, key heads, query heads of each, ...]"""
    return x.reshape(*x.shape[:2], k.shape[2], -1, *x.shape[3:])


def _erase(x: jax.Array, token_index: jax.Array) -> jax.Array:
    """Zeros in the rows of pads: a weight of 0 does not remove a NaN."""
    return jnp.where(token_index[:, :, None, None] >= 0, x, 0)


def _filled(x: jax.Array, value: float, shape: tuple[int, ...] | None = None) -> jax.Array:
    # full_like also copies how x varies over a mesh inside shard_map.
    return lax.full_like(x, value, jnp.float32, shape)


def _pad(tree: Any, front: int, total: int) -> Any:
    def pad(x):
        widths = [(0, 0), (front, total - front - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)

    return jax.tree.map(pad, tree)


def _cut(tree: Any, start: jax.Array, rows: int) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, rows, axis=1), tree)


def _paste(tree: Any, part: Any, start: jax.Array) -> Any:
    return jax.tree.map(
        lambda x, y: lax.dynamic_update_slice_in_dim(x, y, start, axis=1), tree, part
    )


def _split(tree: Any, steps: Plan) -> Any:
    """[b, count * q_block, ...] -> [b * count, q_block, ...]"""
    return jax.tree.map(lambda x: x.reshape(-1, steps.q_block, *x.shape[2:]), tree)


def _join(tree: Any, steps: Plan) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, steps.q_rows, *x.shape[2:]), tree)


def _gather(tree: Any, steps: Plan) -> Any:
    """[b, k_rows, ...] -> [b * count, reach, ...]: the key rows of each query block. Neighbours
    share rows."""
    if steps.count == 1:
        return tree

    def gather(x):
        blocks = [
            _split(x[:, at : at + steps.q_rows], steps)
            for at in range(0, steps.reach, steps.q_block)
        ]
        return jnp.concatenate(blocks, axis=1)

    return jax.tree.map(gather, tree)


def _scatter(x: jax.Array, steps: Plan) -> jax.Array:
    """The transpose of `_gather`: shared rows are summed."""
    if steps.count == 1:
        return x
    total = 0
    for at in range(0, steps.reach, steps.q_block):
        rows = _join(x[:, at : at + steps.q_block], steps)
        total += jnp.pad(rows, [(0, 0), (at, steps.reach - steps.q_block - at), (0, 0), (0, 0)])
    return total
