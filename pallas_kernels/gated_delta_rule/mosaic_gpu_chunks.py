"""All that depends on no state, for every chunk at once: the first of two forward kernels for Hopper GPUs, in Pallas Mosaic GPU.

Computes, for a chunk of 64 tokens of one head and in the notation of xla.py, the decays D and d, the inverse
T = (I + strictly lower part of beta_i k_i.k_j D_ij)^-1, and the scores Q K^T * D.

Tiling: a thread block of one warpgroup takes one chunk of one head; four or so share a multiprocessor and fill each other's waits. The
inverse starts from exact blocks of 2 x 2 and doubles them five times, X <- X - X S X, S the part of the matrix that joins their halves.
Operands of these products are split into two bfloat16, of which three products are formed: 16 bits, as good as float32 here. T and the
scores are rounded to bfloat16 only as they are written: with T in bfloat16 the errors of out and state stay within 0.45 % on every case
of the tests, where rounding inside the doublings would be amplified.

Traffic: q and k read (32 KiB), T and the scores written (16 KiB). Floor at 16 heads and 8,192 tokens: 98 MiB, 0.034 ms at 3 TB/s; the
three-fold products are 7.9 MFLOP a chunk and take about as long, so that the two together set the time.
"""

import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attend.mosaic_gpu_forward import load, spread, transposed

CHUNK = 64
KEY = 128  # width of keys: two tiles of 64
BETA, SINCE, UNTIL, PARTS = 0, 1, 2, 3  # rows of the chunk's vectors

FAR = 1e6  # taken from the logarithm of a decay for each start of a sequence on the way: it becomes 0

f32, bf16 = jnp.float32, jnp.bfloat16


def chunks(q: jax.Array, k: jax.Array, g: jax.Array, beta: jax.Array, starts: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """T [B, H, N, 64, 64] bfloat16, scores [B, H, N, 64, 64] bfloat16 and vectors [B, H, N, 3, 64] float32 of all N chunks.

    The vectors of a chunk are beta, the decay d from the state before the chunk to each token (0 if the token belongs to another
    sequence) and the decay from each token to the chunk's last.

    q, k: [B, T, H, 128] bfloat16, T a multiple of 64, no NaN. g, beta: [B, H, T] float32, finite. starts: [B, T] float32,
    1 for a token before which the state is reset, else 0; None if there is none.
    """
    batch, length, heads, width = k.shape
    assert width == KEY and length % CHUNK == 0
    count = length // CHUNK
    wgmma = plgpu.Layout.WGMMA
    by_row, by_column = wgmma.reduce(1), wgmma.reduce(0)
    square = CHUNK, CHUNK

    def kernel(q_ref, k_ref, g_ref, beta_ref, *rest):
        *starts_refs, inverse_ref, scores_ref, vectors_ref, scratch = rest
        tiles, scores_smem, vectors_smem, sums_smem, ready = scratch
        work = lax.axis_index("work")
        head, n = lax.rem(work, heads), lax.rem(lax.div(work, heads), count)
        b = lax.div(work, heads * count)
        tokens = pl.ds(n * CHUNK, CHUNK)
        for i, source in enumerate((q_ref, k_ref)):
            for half in range(2):
                columns = pl.ds(64 * half, 64)
                plgpu.copy_gmem_to_smem(source.at[b, tokens, head, columns], tiles.at[2 * i + half], ready)

        row, column = (plgpu.broadcasted_iota(jnp.int32, square, i, layout=wgmma) for i in (0, 1))
        summands = [g_ref.at[b, head, tokens], *[starts_ref.at[b, tokens] for starts_ref in starts_refs]]
        by_rows = [jnp.where(column <= row, across(load(x, by_column)), 0.0).sum(axis=1) for x in summands]
        for i, sums in enumerate(by_rows):
            sums_smem[i] = sums
        plgpu.commit_smem()
        by_columns = [load(sums_smem.at[i], by_column) for i in range(len(summands))]
        totals = [sums_smem[i, CHUNK - 1] for i in range(len(summands))]

        def exponent(g, starts=None):
            """Logarithm of a decay, far below all others beyond the start of a sequence."""
            return g if starts is None else g - FAR * starts

        vectors_smem[SINCE] = jnp.exp(exponent(*by_columns))
        vectors_smem[UNTIL] = jnp.exp(exponent(*(x - y for x, y in zip(totals, by_columns, strict=True))))
        between = exponent(*(spread(x, CHUNK) - across(y) for x, y in zip(by_rows, by_columns, strict=True)))
        between = jnp.exp(jnp.where(column < row, between, -jnp.inf))  # masked before: exp would overflow above the diagonal
        vectors_smem[BETA] = load(beta_ref.at[b, head, tokens], by_column)
        beta = load(beta_ref.at[b, head, tokens], by_row)

        def product(*factors):
            """The sum of the products of pairs."""

            def run(acc):
                for left, right in factors:
                    plgpu.wgmma(acc, left, right)
                return plgpu.wgmma_accumulator_load(acc)

            return lax.optimization_barrier(pl.run_scoped(run, plgpu.ACC(square, f32)))

        plgpu.barrier_wait(ready)
        q_tiles, k_tiles = ([tiles.at[i], tiles.at[i + 1]] for i in (0, 2))
        gram = product(*[(tile, transposed(tile)) for tile in k_tiles])
        scores = product(*[(left, transposed(right)) for left, right in zip(q_tiles, k_tiles, strict=True)])
        scores_smem[...] = jnp.where(column == row, scores, scores * between).astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scores_smem, scores_ref.at[b, head, n])
        plgpu.copy_smem_to_gmem(vectors_smem, vectors_ref.at[b, head, n])

        a = spread(beta, CHUNK) * gram * between  # between is 0 on and above the diagonal
        a_high, a_low = halves(a)
        inverse = jnp.where(column == row, 1.0, jnp.where(joins(row, column, 0), -a, 0.0))
        for level in range(1, CHUNK.bit_length() - 1):
            here = joins(row, column, level)
            left = [jnp.where(here, x, 0.0).astype(bf16) for x in (a_high, a_low)]
            high, low = halves(inverse)
            share(tiles, 0, high, low)
            joined = product(*three(left, tiles, 0))
            share(tiles, 2, *halves(joined))
            inverse = inverse - product(*three([high.astype(bf16), low.astype(bf16)], tiles, 2))
        tiles.at[0][...] = inverse.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tiles.at[0], inverse_ref.at[b, head, n])
        plgpu.wait_smem_to_gmem(0)

    def entry(*refs):
        tiled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
        pl.run_scoped(
            lambda *scratch: kernel(*refs, scratch),
            plgpu.SMEM((4, *square), bf16, transforms=tiled),
            plgpu.SMEM(square, bf16, transforms=tiled),
            plgpu.SMEM((PARTS, CHUNK), f32),
            plgpu.SMEM((2, CHUNK), f32),
            plgpu.Barrier(num_arrivals=4),
        )

    lead = batch, heads, count
    return plgpu.kernel(
        entry,
        out_type=[jax.ShapeDtypeStruct((*lead, *square), bf16)] * 2 + [jax.ShapeDtypeStruct((*lead, PARTS, CHUNK), f32)],
        grid=(math.prod(lead),),
        grid_names=("work",),
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        kernel_name="gdn_chunks",
    )(q, k, g, beta, *(() if starts is None else (starts,)))


def across(x, rows=CHUNK):
    """A number for each column, for all rows."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def joins(row, column, level):
    """Where the two halves of each block of 2^(level + 1) meet, below the diagonal."""
    return (row >> (level + 1) == column >> (level + 1)) & (row >> level > column >> level)


def halves(x):
    """x as the sum of two bfloat16, kept in float32."""
    high = x.astype(bf16).astype(f32)
    return high, (x - high)


def share(tiles, first, high, low):
    """Put the halves of a matrix into shared memory."""
    tiles.at[first][...], tiles.at[first + 1][...] = high.astype(bf16), low.astype(bf16)
    plgpu.commit_smem()


def three(left, tiles, first):
    """The products that make that of two matrices in halves, but for the smallest."""
    return (left[0], tiles.at[first]), (left[1], tiles.at[first]), (left[0], tiles.at[first + 1])
