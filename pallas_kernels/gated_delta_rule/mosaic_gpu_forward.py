"""Out, the last state and what the backward pass keeps, by the two forward kernels for Hopper GPUs.

mosaic_gpu_chunks.py does all that depends on no state, for every chunk at once; mosaic_gpu_walk.py goes through the chunks with the
state in registers and gives the outputs on its way. Between them lie 16 KiB for each chunk of each head.
"""

import jax

from pallas_kernels.gated_delta_rule.mosaic_gpu_chunks import chunks
from pallas_kernels.gated_delta_rule.mosaic_gpu_walk import WIDTH, Tuning, walk

MULTIPROCESSORS = 132  # of an H100 or H200


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    starts: jax.Array | None,
    initial_state: jax.Array | None,
    keep: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """out [B, T, H, V] bfloat16, the last state [B, H, 128, V] float32, T [B, H, N, 64, 64] bfloat16 and, if keep, the state
    before each of the N chunks [B, H, N, 128, V] bfloat16.

    q, k: [B, T, H, 128] and v: [B, T, H, V], bfloat16, zero at pads, T a multiple of 64, V too.
    g, beta: [B, H, T] float32, finite, zero at pads. starts: [B, T] float32, 1 for a token before which the
    state is reset, else 0; None if there is none.
    initial_state: [B, H, 128, V] float32; None is zeros.
    """
    inverse, scores, vectors = chunks(q, k, g, beta, starts)
    out, last, *states = walk(q, k, v, inverse, scores, vectors, initial_state, keep, tuning(v, keep))
    return out, last, inverse, states[0] if keep else None


def tuning(v: jax.Array, keep: bool) -> Tuning:
    """One slice a block while there are multiprocessors for all slices, then two, to read k and q less often."""
    batch, _, heads, width = v.shape
    slices = width // WIDTH
    if slices % 2 or batch * heads * slices <= MULTIPROCESSORS:
        return Tuning(slices=1, stages=3)
    return Tuning(slices=2, stages=2 if keep else 3)
