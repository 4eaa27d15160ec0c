"""The gated delta rule on Hopper GPUs (H100, H200), by Mosaic GPU kernels.

The kernels take chunks of 64 tokens, and packed sequences as numbered segments. Here rows are
padded to whole chunks and pads are zeroed. Measurements and comparisons with other libraries:
benchmarks/results/gated_delta_rule.jsonl.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels.gated_delta_rule.api import check
from pallas_kernels.gated_delta_rule.chunk_layout import without_pads
from pallas_kernels.gated_delta_rule.hopper import backward, forward
from pallas_kernels.gated_delta_rule.hopper.chunks import CHUNK, KEY
from pallas_kernels.gated_delta_rule.hopper.spans import WIDTH
from pallas_kernels.segments import segment_numbers

# Smallest log decay: e^-90 is no normal float32, and sums of 64 of these keep four decimals.
FLOOR = -90.0

f32 = jnp.float32


def supports(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    initial_state: jax.Array | None = None,
    token_index: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> str | None:
    """Returns the reason it does not take these arrays (or shapes with dtypes), else None."""
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        return f"dtypes {q.dtype}, {k.dtype} and {v.dtype}: bfloat16 only"
    if k.shape[3] != KEY:
        return f"keys {k.shape[3]} wide: {KEY} only"
    if not v.shape[3] or v.shape[3] % WIDTH:
        return f"values {v.shape[3]} wide: multiples of {WIDTH} only"
    if k.shape[2] != v.shape[2]:
        return f"{k.shape[2]} key heads for {v.shape[2]} value heads: as many of each"
    if not all(k.shape[:3]):
        return "no tokens"
    if k.shape[1] == 1:
        return "a single token, which fills no chunk"
    return None


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
    """The contract of `pallas_kernels.gated_delta_rule.gated_delta_rule`.

    The residuals "gdn_inverse" (two parts of T) and "gdn_states" are bfloat16. Raises ValueError
    where `check` does or `supports` gives a reason.
    """
    check(q, k, v, g, beta, initial_state)
    if reason := supports(q, k, v, g, beta, initial_state, token_index, segment_ids):
        raise ValueError(
            f"the gated delta rule on Hopper does not take {reason}\n  -> use the"
            " implementation xla"
        )
    if initial_state is not None:
        initial_state = initial_state.astype(f32)
    return _delta_rule(
        q, k, v, g.astype(f32), beta.astype(f32), initial_state, token_index, segment_ids
    )


def _run(q, k, v, g, beta, initial_state, token_index, segment_ids, keep):
    length = k.shape[1]
    q, k, v, g, beta, token_index, segment_ids = _whole_chunks(
        q, k, v, g, beta, token_index, segment_ids
    )
    valid = None if token_index is None else token_index >= 0
    q, k, v, g, beta = (without_pads(x, valid) for x in (q, k, v, g, beta))
    g, beta = heads_first(jnp.maximum(g, FLOOR)), heads_first(beta)
    starts = None if segment_ids is None else sequence_starts(token_index, segment_ids)
    out, last, inverse, states = forward.forward(q, k, v, g, beta, starts, initial_state, keep)
    if token_index is not None:  # without valid tokens, 1 * S + 0 would turn -0 into 0
        before = jnp.zeros_like(last) if initial_state is None else initial_state
        last = jnp.where((token_index >= 0).any(1)[:, None, None, None], last, before)
    return (out[:, :length], last), (inverse, states)


def heads_first(x):
    """[B, T, H] -> [B, H, T].

    Where g and beta are parts of a joint projection, XLA would have all of it computed with the
    tokens innermost, and copy the other parts back. The layout stops that here.
    """
    return with_layout_constraint(x, Layout((0, 1, 2))).swapaxes(1, 2)


def sequence_starts(token_index, segment_ids):
    """[B, T] float32: 1 for the first token of each sequence except a row's first, else 0."""
    segments = segment_numbers(token_index, segment_ids)
    return jnp.diff(segments, axis=1, prepend=0).astype(f32)


def _whole_chunks(q, k, v, g, beta, token_index, segment_ids):
    """Rows filled up to whole chunks with tokens that change nothing."""

    def fill(x, **how):
        return (
            x
            if x is None
            else jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK)] + [(0, 0)] * (x.ndim - 2), **how)
        )

    if k.shape[1] % CHUNK == 0:
        return q, k, v, g, beta, token_index, segment_ids
    tokens = (fill(x) for x in (q, k, v, g, beta))
    return *tokens, fill(token_index, constant_values=-1), fill(segment_ids, mode="edge")


@jax.custom_vjp
def _delta_rule(q, k, v, g, beta, initial_state, token_index, segment_ids):
    return _run(q, k, v, g, beta, initial_state, token_index, segment_ids, keep=False)[0]


def _delta_rule_forward(q, k, v, g, beta, initial_state, token_index, segment_ids):
    results, (inverse, states) = _run(
        q, k, v, g, beta, initial_state, token_index, segment_ids, keep=True
    )
    kept = checkpoint_name(inverse, "gdn_inverse"), checkpoint_name(states, "gdn_states")
    return (checkpoint_name(results[0], "gdn_out"), results[1]), (
        q,
        k,
        v,
        g,
        beta,
        initial_state,
        token_index,
        segment_ids,
        *kept,
    )


def _delta_rule_backward(residuals, cts):
    q, k, v, g, beta, initial_state, token_index, segment_ids, inverse, states = residuals
    length = k.shape[1]
    d_out = jnp.pad(cts[0], [(0, 0), (0, -length % CHUNK), (0, 0), (0, 0)])
    q, k, v, g, beta, token_index, segment_ids = _whole_chunks(
        q, k, v, g, beta, token_index, segment_ids
    )
    valid = None if token_index is None else token_index >= 0
    q, k, v, g, beta, d_out = (without_pads(x, valid) for x in (q, k, v, g, beta, d_out))
    g, beta = heads_first(jnp.maximum(g, FLOOR)), heads_first(beta)
    segments = None if segment_ids is None else segment_numbers(token_index, segment_ids)
    found = backward.backward(
        q, k, v, g, beta, segments, inverse, states, d_out, cts[1].astype(f32)
    )
    *wide, d_g, d_beta, d_initial = found
    d_g, d_beta = (without_pads(x.swapaxes(1, 2), valid) for x in (d_g, d_beta))
    return (
        *(x[:, :length] for x in (*wide, d_g, d_beta)),
        None if initial_state is None else d_initial,
        None,
        None,
    )


_delta_rule.defvjp(_delta_rule_forward, _delta_rule_backward)
