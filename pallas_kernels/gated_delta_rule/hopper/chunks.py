"""Everything that depends on no state, for all chunks in parallel: the first of two forward kernels
for Hopper GPUs, in Pallas Mosaic GPU.

Computes, for a chunk of 64 tokens of one head and in the notation of xla.py, the decays D and d,
the inverse T = (I + A)^-1 with A the strictly lower part of beta_i k_i.k_j D_ij, and the scores Q
K^T * D.

Tiling: three warpgroups a thread block and one thread block a multiprocessor. Each warpgroup takes
its own chunks and meanwhile copies q and k of its next one (TMA), so that one warpgroup computes
while another waits. The inverse starts from exact blocks of 2 x 2 and doubles them five times: X <-
X - X S X, with S the part of A that joins their halves. The whole of X A X is formed and only that
part of it taken, so that A is rounded once. Operands of these products are two bfloat16 each, of
which three products are formed: 16 bits.

Rounding: T and the scores are written as two bfloat16 each. With one, errors of out reach 1.2 %
where keys repeat and nothing decays: the updates of the state then almost cancel, and their errors
do not. With two, no test case has more than 0.35 %. The first part of T is rounded to the nearest,
because the gradients use it alone in places, where a bias would add up.

Traffic: for a chunk of a head 32 KiB (q and k) read and 32 KiB written. Floor at 16 heads and 8,192
tokens: 128 MiB, 0.045 ms at 3 TB/s. The 136 wgmma of 64 x 64 x 16 a chunk take 4,352 clocks of a
multiprocessor's tensor cores, 0.039 ms.
"""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.spans import KEY
from pallas_kernels.gated_delta_rule.tuning import HopperChunks as Tuning
from pallas_kernels.hardware import HOPPER_MULTIPROCESSORS
from pallas_kernels.mosaic_gpu import (
    across,
    load,
    multiply,
    nearest_halves,
    rounded_halves,
    spread,
    transposed,
)

CHUNK = 64
GROUPS = Tuning.groups
BETA, SINCE, UNTIL, PARTS = 0, 1, 2, 3  # rows of the chunk's vectors

# Subtracted from the logarithm of a decay for each sequence that starts in between: exp gives 0.
FAR = 1e6

f32, bf16 = jnp.float32, jnp.bfloat16


def chunks(
    q: jax.Array, k: jax.Array, g: jax.Array, beta: jax.Array, starts: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """T and the scores [B, H, N, 128, 64] bfloat16 and vectors [B, H, N, 3, 64] float32 of all N
    chunks.

    T and the scores are the sum of rows 0 to 63 and rows 64 to 127. The vectors of a chunk are
    beta, the decay d from the state before the chunk to each token (0 if the token belongs to
    another sequence) and the decay from each token to the chunk's last.

    q, k: [B, T, H, 128] bfloat16, T a multiple of 64, no NaN.
    g, beta: [B, H, T] float32, finite.
    starts: [B, T] float32, 1 for a token before which the state is reset, else 0. None: no resets.
    """
    batch, length, heads, width = k.shape
    assert width == KEY and length % CHUNK == 0
    count = length // CHUNK
    wgmma = plgpu.Layout.WGMMA
    by_row, by_column = wgmma.reduce(1), wgmma.reduce(0)
    square = CHUNK, CHUNK

    lead = batch, heads, count
    total = math.prod(lead)
    blocks = min(HOPPER_MULTIPROCESSORS, -(-total // GROUPS))

    def kernel(q_ref, k_ref, g_ref, beta_ref, *rest):
        *starts_refs, inverse_ref, scores_ref, vectors_ref, scratch = rest
        all_tiles, all_steps, all_vectors, ready = scratch
        me = lax.axis_index("group")
        vectors_smem = all_vectors.at[me]
        first = lax.axis_index("work") * GROUPS + me
        mine = lax.div(jnp.maximum(total - first, 0) + blocks * GROUPS - 1, blocks * GROUPS)

        def place(i):
            unit = first + i * blocks * GROUPS
            head, rest = lax.rem(unit, heads), lax.div(unit, heads)
            return lax.div(rest, count), head, lax.rem(rest, count)

        def fetch(i):
            b, head, n = place(i)
            tokens = pl.ds(n * CHUNK, CHUNK)
            at = me, lax.rem(i, 2)
            sources = [
                source.at[b, tokens, head, pl.ds(64 * half, 64)]
                for source in (q_ref, k_ref)
                for half in range(2)
            ]
            for j, source in enumerate(sources):
                plgpu.copy_gmem_to_smem(source, all_tiles.at[*at, j], ready.at[*at])
            steps = [
                beta_ref.at[b, head, tokens],
                g_ref.at[b, head, tokens],
                *[ref.at[b, tokens] for ref in starts_refs],
            ]
            for j, source in enumerate(steps):
                plgpu.copy_gmem_to_smem(source, all_steps.at[*at, j], ready.at[*at])

        row, column = (plgpu.broadcasted_iota(jnp.int32, square, i, layout=wgmma) for i in (0, 1))
        pl.when(mine > 0)(lambda: fetch(0))

        @pl.loop(0, mine)
        def _(i):
            b, head, n = place(i)
            at = me, lax.rem(i, 2)
            tiles, (beta_smem, *summands) = (
                all_tiles.at[*at],
                [all_steps.at[*at, j] for j in range(2 + len(starts_refs))],
            )
            # The last chunk's results have left the tiles that are filled next.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            pl.when(i + 1 < mine)(lambda: fetch(i + 1))
            plgpu.barrier_wait(ready.at[*at])
            by_rows = [
                jnp.where(
                    column <= row, across(load(x, by_column, optimized=True), CHUNK), 0.0
                ).sum(axis=1)
                for x in summands
            ]
            for j, sums in enumerate(by_rows):
                vectors_smem[SINCE + j] = sums  # a change to the other layout
            plgpu.commit_smem()
            by_columns = [
                load(vectors_smem.at[SINCE + j], by_column, optimized=True)
                for j in range(len(summands))
            ]
            totals = [vectors_smem[SINCE + j, CHUNK - 1] for j in range(len(summands))]
            vectors_smem[BETA] = load(beta_smem, by_column, optimized=True)
            vectors_smem[SINCE] = jnp.exp(exponent(*by_columns))
            vectors_smem[UNTIL] = jnp.exp(
                exponent(*(x - y for x, y in zip(totals, by_columns, strict=True)))
            )
            between = exponent(
                *(
                    spread(x, CHUNK) - across(y, CHUNK)
                    for x, y in zip(by_rows, by_columns, strict=True)
                )
            )
            # Masked before: exp would overflow above the diagonal.
            between = jnp.exp(jnp.where(column < row, between, -jnp.inf))

            def put(halves, first, target):
                """Write the halves of a matrix through two tiles."""
                tiles.at[first][...], tiles.at[first + 1][...] = halves
                plgpu.commit_smem()
                for half in range(2):
                    plgpu.copy_smem_to_gmem(
                        tiles.at[first + half], target.at[b, head, n, pl.ds(half * CHUNK, CHUNK)]
                    )

            scores = multiply(
                square,
                (tiles.at[0], transposed(tiles.at[2])),
                (tiles.at[1], transposed(tiles.at[3])),
            )
            put(rounded_halves(jnp.where(column == row, scores, scores * between)), 0, scores_ref)
            plgpu.copy_smem_to_gmem(vectors_smem, vectors_ref.at[b, head, n])
            gram = multiply(square, *[(tiles.at[j], transposed(tiles.at[j])) for j in (2, 3)])
            # 0 on and above the diagonal.
            a = spread(load(beta_smem, by_row, optimized=True), CHUNK) * gram * between
            inverse = jnp.where(column == row, 1.0, jnp.where(joins(row, column, 0), -a, 0.0))
            a_high, a_low = rounded_halves(a)

            def double(level, inverse):
                share(tiles, 2, inverse)
                joined = multiply(
                    square, (a_high, tiles.at[2]), (a_low, tiles.at[2]), (a_high, tiles.at[3])
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the scores
                share(tiles, 0, joined)
                joined = multiply(
                    square,
                    (tiles.at[2], tiles.at[0]),
                    (tiles.at[3], tiles.at[0]),
                    (tiles.at[2], tiles.at[1]),
                )
                return jnp.where(joins(row, column, level), -joined, inverse)

            # A loop, because short code stays in the instruction cache.
            inverse = lax.fori_loop(1, CHUNK.bit_length() - 1, double, inverse)
            put(nearest_halves(inverse), 2, inverse_ref)

        plgpu.wait_smem_to_gmem(0)

    def entry(*refs):
        tiled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            plgpu.SMEM((GROUPS, 2, 4, *square), bf16, transforms=tiled),
            plgpu.SMEM((GROUPS, 2, 3, CHUNK), f32),
            plgpu.SMEM((GROUPS, PARTS, CHUNK), f32),
            plgpu.Barrier(num_arrivals=6 + (starts is not None), num_barriers=(GROUPS, 2)),
            collective_axes="group",
        )

    return plgpu.kernel(
        entry,
        out_type=[jax.ShapeDtypeStruct((*lead, 2 * CHUNK, CHUNK), bf16)] * 2
        + [jax.ShapeDtypeStruct((*lead, PARTS, CHUNK), f32)],
        grid=(blocks,),
        grid_names=("work",),
        num_threads=GROUPS,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="gdn_chunks",
    )(q, k, g, beta, *(() if starts is None else (starts,)))


def exponent(g, starts=None):
    """The logarithm of a decay, from sums of log decays. Across the start of a sequence it is far
    below all others."""
    return g if starts is None else g - FAR * starts


def joins(row, column, level):
    """Where the two halves of each block of 2^(level + 1) meet below the diagonal: rows of the
    lower half, columns of the upper half."""
    row, column = row >> level, column >> level
    return ((row & 1) == 1) & (column == row - 1)


def share(tiles, first, x):
    """Put the halves of a matrix into shared memory."""
    tiles.at[first][...], tiles.at[first + 1][...] = rounded_halves(x)
    plgpu.commit_smem()
