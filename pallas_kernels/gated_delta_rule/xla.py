"""The gated delta rule in chunks: everything inside a chunk for all chunks in parallel, then a scan
over the chunks.

Notation for one head and one chunk of C tokens, with S the state before it:

    D_ij = exp(g_(j+1) + ... + g_i) for i >= j, 0 above the diagonal     decay from token j to token
    i d_i  = exp(g_1 + ... + g_i)                                          decay from the state
    before the chunk to token i A    = strictly lower part of (beta_i k_i.k_j D_ij),  T = (I + A)^-1
    u    = T (beta V),  w = T (beta d K),  new = u - w S                 what each token adds to the
    state out  = (d Q) S + (Q K^T * D) new S'   = d_C S + (D_C K)^T new
    D_C: the last row of D

Sequences packed in one row are kept apart by D and d alone: D_ij is 0 between tokens of different
sequences, and d_i is 0 for a token that does not belong to the sequence of S. A reset is therefore
exact. A pad has q, k, v, beta and g zero, so it changes nothing.

Gates, beta, d, D, T and S are float32. Arrays are [chunks, batch, heads, C, ...] throughout: the
scan takes slices of the leading axis.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.gated_delta_rule.api import check, repeat_key_heads
from pallas_kernels.gated_delta_rule.tuning import XLA as XLADelta
from pallas_kernels.segments import segment_numbers

FLOOR = (
    -200.0
)  # below it exp and its derivative are 0 in float32; above it sums of 128 coarse gates are exact
COARSE = 256.0  # gates are split into a multiple of 1/COARSE and a rest

f32 = jnp.float32


def gated_delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    initial_state: jax.Array | None = None,
    token_index: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The contract of `pallas_kernels.gated_delta_rule.gated_delta_rule`."""
    check(q, k, v, g, beta, initial_state)
    q, k = (repeat_key_heads(x, v.shape[2]) for x in (q, k))
    g, beta, initial_state = _start(k, v, g, beta, initial_state)
    if not k.size:
        return jnp.zeros_like(v), initial_state
    if k.shape[1] == 1:
        return _step(q, k, v, g, beta, initial_state, token_index)
    return _delta_rule(q, k, v, g, beta, initial_state, token_index, segment_ids)


def _start(k, v, g, beta, initial_state):
    """g, beta and the initial state as float32 arrays."""
    if initial_state is None and not k.shape[1]:
        initial_state = jnp.zeros((k.shape[0], *k.shape[2:], v.shape[3]), f32)
    if initial_state is None:  # zeros that are sharded as the inputs are
        initial_state = jnp.zeros_like(k[:, 0, :, :, None], f32) + jnp.zeros_like(
            v[:, 0, :, None, :], f32
        )
    return g.astype(f32), beta.astype(f32), initial_state.astype(f32)


def _step(q, k, v, g, beta, state, token_index):
    """One token: the definition, but the state is read once for both k^T S and q^T S. One token
    meets no change of segment."""
    valid = None if token_index is None else token_index[:, 0] >= 0
    q, k, v_, g, beta = (_without_pads(x[:, 0], valid) for x in (q, k, v, g, beta))
    q, k, v_ = (x.astype(f32) for x in (q, k, v_))
    decay = jnp.exp(g)[..., None]  # [B, H, 1]
    update = beta[..., None] * (v_ - decay * jnp.sum(k[..., None] * state, axis=-2))  # [B, H, V]
    out = (
        decay * jnp.sum(q[..., None] * state, axis=-2)
        + jnp.sum(q * k, axis=-1, keepdims=True) * update
    )
    new = decay[..., None] * state + k[..., None] * update[..., None, :]  # [B, H, K, V]
    if valid is not None:
        out = _without_pads(out, valid)
        new = jnp.where(valid[:, None, None, None], new, state)
    return out[:, None].astype(v.dtype), new


# --- products
# --------------------------------------------------------------------------------------------------


class How(NamedTuple):
    """Operand dtype and precision of a product, forward and backward; the result is float32."""

    forward: tuple
    backward: tuple


class Products(NamedTuple):
    gram: How  # of inputs with inputs
    chunk: How  # of anything else inside a chunk
    state: How  # with a state or a state's gradient
    update: How  # what a chunk adds to the state


def _products(*inputs) -> Products:
    full = (f32, lax.Precision.HIGHEST)
    if any(x.dtype != jnp.bfloat16 for x in inputs):
        return Products(*[How(full, full)] * 4)
    # One bfloat16 pass is exact for products of bfloat16 inputs. What is derived from them inside a
    # chunk needs more bits, or gate gradients go wrong; so does what is added to the state, where
    # one key comes again and again.
    once, more = (jnp.bfloat16, lax.Precision.DEFAULT), (f32, lax.Precision.HIGH)
    return Products(
        gram=How(once, more), chunk=How(more, more), state=How(once, once), update=How(more, more)
    )


def _dot(a, b, operands):
    dtype, precision = operands
    return jnp.matmul(
        a.astype(dtype), b.astype(dtype), precision=precision, preferred_element_type=f32
    )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(a, b, how: How):
    """a @ b over equal leading axes, float32 out. The derivative is spelt out to give cotangents
    their operand dtype."""
    return _dot(a, b, how.forward)


def _matmul_backward(how, operands, ct):
    a, b = operands
    return _dot(ct, b.mT, how.backward).astype(a.dtype), _dot(a.mT, ct, how.backward).astype(
        b.dtype
    )


_matmul.defvjp(lambda a, b, how: (_dot(a, b, how.forward), (a, b)), _matmul_backward)


# --- inside a chunk
# --------------------------------------------------------------------------------------------------


def _without_pads(x, valid):
    """Zero the pads of x; `valid` covers x's leading axes."""
    return (
        x
        if valid is None
        else jnp.where(valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim)), x, 0)
    )


def _chunk_size(length: int) -> int:
    return min(XLADelta.chunk, max(XLADelta.smallest, 1 << (length - 1).bit_length()))


def _split(x, size):
    """[batch, length, heads, ...] -> [chunks, batch, heads, size, ...], zeros after the end."""
    batch, length, heads = x.shape[:3]
    chunks = math.ceil(length / size)
    x = jnp.pad(x, [(0, 0), (0, chunks * size - length)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(batch, chunks, size, heads, *x.shape[3:])
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def _join(x, length):
    """[chunks, batch, heads, size, V] -> [batch, length, heads, V]."""
    chunks, batch, heads, size, width = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, chunks * size, heads, width)[:, :length]


def _segment_masks(token_index, segment_ids, length, size):
    """Which pairs of tokens share a sequence [chunks, batch, 1, C, C], which tokens share that
    of the state before [..., C]."""
    if segment_ids is None:
        return None, None
    run = segment_numbers(token_index, segment_ids)
    run = jnp.concatenate(
        [run, jnp.repeat(run[:, -1:], -length % size, axis=1)], axis=1
    )  # what fills up is like pads
    run = _split(run[:, :, None], size)  # [N, B, 1, C]
    before = jnp.pad(
        run[:-1, ..., -1:], ((1, 0), (0, 0), (0, 0), (0, 0))
    )  # the first chunk's state belongs to segment 0
    return run[..., :, None] == run[..., None, :], run == before


def _lower(size, dtype=f32):
    return jnp.tri(size, dtype=dtype)


def _running_sums(g):
    """g [..., C] -> [2, ..., C], whose sum over the leading axis is g's running sum.

    Differences of a plain running sum would lose 1e-4 at sums of -2000. Coarse gates sum without
    rounding, and the fine rest stays small.
    """
    coarse = jnp.round(g * COARSE) / COARSE
    return jnp.matmul(
        jnp.stack([coarse, g - coarse]), _lower(g.shape[-1]).T, precision=lax.Precision.HIGHEST
    )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _decays(g, pairs, carried, how: How):
    """g [..., C] -> D [..., C, C] and d [..., C] of the module's docstring; `pairs` and
    `carried` are `_segment_masks`."""
    size = g.shape[-1]
    sums = _running_sums(g)
    exponent = sum(sums[..., :, None] - sums[..., None, :])
    keep = _lower(size, bool) & ~jnp.eye(size, dtype=bool)
    if pairs is not None:
        keep &= pairs
    # Masked before exp: above the diagonal it would overflow.
    between = jnp.exp(jnp.where(keep, exponent, -jnp.inf)) + jnp.eye(size, dtype=f32)
    since = jnp.exp(sum(sums))
    return between, since if carried is None else jnp.where(carried, since, 0)


def _decays_forward(g, pairs, carried, how):
    between, since = _decays(g, pairs, carried, how)
    return (between, since), (between, since)


def _decays_backward(how, decays, ct):
    # g_t stands in D_ij for i >= t > j and in d_i for i >= t. Adding up just those terms, not the
    # difference of row and column sums, keeps the gradient exact where it is far smaller than its
    # terms (gates of e^-30).
    between, since = decays
    size = since.shape[-1]
    strict = _lower(size, bool) & ~jnp.eye(size, dtype=bool)
    pairs = jnp.where(strict, ct[0] * between, 0)  # [..., i, j]
    dtype, precision = how.backward
    spanned = jnp.einsum(
        "...ij,it->...jt", pairs.astype(dtype), _lower(size, dtype), precision=precision
    )
    through_pairs = jnp.where(strict.T, spanned, 0).sum(-2)
    through_carried = jnp.matmul(ct[1] * since, _lower(size), precision=lax.Precision.HIGHEST)
    return through_pairs + through_carried, None, None


_decays.defvjp(_decays_forward, _decays_backward)


def _unit_lower_inverse(a):
    """(I + a)^-1 for strictly lower a [..., C, C], C a power of two.

    Diagonal blocks are inverted exactly, and doubled in size until one is left: [[X, 0], [Y, Z]]^-1
    = [[X', 0], [-Z' Y X', Z']], which for all blocks at once is X - X S X with S the part of a that
    joins their halves. No power of a is ever formed: they can overflow where the inverse is tame.
    Whole matrices throughout: small slices are slow to run and, on TPU, very slow to compile.
    """
    size = a.shape[-1]
    multiply = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    place = jnp.arange(size)

    def joins(level):  # between the two halves of each block of 2^(level + 1)
        return (place[:, None] >> (level + 1) == place >> (level + 1)) & (
            place[:, None] >> level > place >> level
        )

    def double(level, inverse):
        return inverse - multiply(inverse, multiply(jnp.where(joins(level), a, 0), inverse))

    pairs = jnp.eye(size, dtype=a.dtype) - jnp.where(joins(0), a, 0)
    return lax.fori_loop(
        1, size.bit_length() - 1, double, pairs
    )  # a loop: the doublings would compile one by one


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _known_inverse(a, inverse, how: How):
    """`inverse`, which is (I + a)^-1, with the derivative in a."""
    return inverse


_known_inverse.defvjp(
    lambda a, inverse, how: (inverse, inverse),
    lambda how, t, ct: (
        -jnp.tril(_dot(t.mT, _dot(ct, t.mT, how.backward), how.backward), -1),
        jnp.zeros_like(t),
    ),
)


class Chunks(NamedTuple):
    """All that depends on no state, [chunks, batch, heads, ...] float32."""

    inverse: jax.Array  # T [C, C]
    u: jax.Array  # [C, V]
    w: jax.Array  # [C, K]
    queries: jax.Array  # d Q [C, K]
    keys: jax.Array  # (D_C K)^T [K, C]
    scores: jax.Array  # Q K^T * D [C, C]
    decay: jax.Array  # d_C [1, 1]


def _prepare(
    q, k, v, g, beta, token_index, segment_ids, how: Products, size, invert=_unit_lower_inverse
) -> Chunks:
    """Everything inside chunks of `size` tokens; `invert` makes T of A, or gives it where it is
    known."""
    length = k.shape[1]
    valid = None if token_index is None else token_index >= 0
    q, k, v, g, beta = (
        _split(_without_pads(x, valid), size).astype(f32) for x in (q, k, v, g, beta)
    )
    between, since = _decays(
        jnp.maximum(g, FLOOR), *_segment_masks(token_index, segment_ids, length, size), how.chunk
    )
    a = jnp.tril(beta[..., None] * _matmul(k, k.mT, how.gram) * between, -1)
    inverse = _known_inverse(a, checkpoint_name(invert(a), "gdn_inverse"), how.chunk)
    return Chunks(
        inverse=inverse,
        u=_matmul(inverse, beta[..., None] * v, how.chunk),
        w=_matmul(inverse, (beta * since)[..., None] * k, how.chunk),
        queries=since[..., None] * q,
        keys=(between[..., -1, :, None] * k).mT,
        scores=_matmul(q, k.mT, how.gram) * between,
        decay=since[..., -1:, None],
    )


# --- over the chunks
# --------------------------------------------------------------------------------------------------


def _chunk_scan(chunks: Chunks, state, how: Products):
    """The state before each chunk [chunks, batch, heads, K, V] in the dtype of its products, and
    the last one in float32."""
    dtype = how.state.forward[0]

    def chunk(state, x):
        w, u, keys, decay = x
        new = u - _matmul(w, state, how.state)
        return decay * state + _matmul(keys, new, how.update), state.astype(dtype)

    last, states = lax.scan(
        chunk, state, (chunks.w.astype(dtype), chunks.u, chunks.keys, chunks.decay)
    )
    return states, last


def _outputs(chunks: Chunks, states, how: Products):
    """Given the state before each chunk, the chunks' outputs and the states after them."""
    new = chunks.u - _matmul(chunks.w, states, how.state)
    out = _matmul(chunks.queries, states, how.state) + _matmul(chunks.scores, new, how.chunk)
    return out, chunks.decay * states + _matmul(chunks.keys, new, how.update)


def _chunk_scan_backward(chunks: Chunks, ct_out, ct_last, how: Products):
    """Gradient in the state after each chunk [chunks, batch, heads, K, V] and in the initial one
    (float32)."""
    dtype = how.state.backward[0]
    readers = jnp.concatenate([chunks.queries, -chunks.w], axis=-2).mT.astype(dtype)  # [K, 2 C]
    ct_new = _dot(
        chunks.scores.mT, ct_out, how.chunk.backward
    )  # [C, V], lacks what comes through the state after

    def chunk(ct, x):
        readers, keys, ct_out, ct_new, decay = x
        ct_new = ct_new + _dot(keys.mT, ct, how.state.backward)
        read = jnp.concatenate([ct_out, ct_new.astype(dtype)], axis=-2)
        return decay * ct + _dot(readers, read, how.state.backward), ct.astype(dtype)

    xs = (readers, chunks.keys.astype(dtype), ct_out.astype(dtype), ct_new, chunks.decay)
    first, cts = lax.scan(chunk, ct_last, xs, reverse=True)
    return cts, first


def _run(q, k, v, g, beta, initial_state, token_index, segment_ids):
    how = _products(q, k, v)
    chunks = _prepare(q, k, v, g, beta, token_index, segment_ids, how, _chunk_size(k.shape[1]))
    states, last = _chunk_scan(chunks, initial_state, how)
    states = checkpoint_name(states, "gdn_states")
    out, _ = _outputs(chunks, states, how)
    return (_join(out.astype(v.dtype), k.shape[1]), _kept(initial_state, last, token_index)), (
        chunks.inverse,
        states,
    )


def _kept(initial_state, last, token_index):
    """The last state, but of rows without valid tokens the initial one: adding zero would have
    turned -0 into 0."""
    return (
        last
        if token_index is None
        else jnp.where((token_index >= 0).any(1)[:, None, None, None], last, initial_state)
    )


@jax.custom_vjp
def _delta_rule(q, k, v, g, beta, initial_state, token_index, segment_ids):
    return _run(q, k, v, g, beta, initial_state, token_index, segment_ids)[0]


def _delta_rule_forward(q, k, v, g, beta, initial_state, token_index, segment_ids):
    results, (inverse, states) = _run(q, k, v, g, beta, initial_state, token_index, segment_ids)
    return (checkpoint_name(results[0], "gdn_out"), results[1]), (
        q,
        k,
        v,
        g,
        beta,
        token_index,
        segment_ids,
        inverse,
        states,
    )


def _delta_rule_backward(residuals, cts):
    return _backward(residuals, cts, _chunk_size(residuals[0].shape[1]))


def _backward(residuals, cts, size):
    """Gradients in `_delta_rule`'s arguments, in chunks of `size` tokens."""
    q, k, v, g, beta, token_index, segment_ids, inverse, states = residuals
    ct_out, ct_last = cts
    how = _products(q, k, v)
    ct_out = _split(
        _without_pads(ct_out, None if token_index is None else token_index >= 0), size
    ).astype(f32)

    chunks, pull = jax.vjp(
        lambda *inputs: _prepare(*inputs, token_index, segment_ids, how, size, lambda a: inverse),
        q,
        k,
        v,
        g,
        beta,
    )
    _, pull_outputs = jax.vjp(lambda chunks: _outputs(chunks, states, how), chunks)
    ct_states, ct_initial = _chunk_scan_backward(chunks, ct_out, ct_last.astype(f32), how)
    return *pull(*pull_outputs((ct_out, ct_states.astype(f32)))), ct_initial, None, None


_delta_rule.defvjp(_delta_rule_forward, _delta_rule_backward)
