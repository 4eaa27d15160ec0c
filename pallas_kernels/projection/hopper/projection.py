"""The projection of 1 to 16 rows on Hopper GPUs, in one kernel of Pallas Mosaic GPU.
`pallas_kernels.projection.projection` is the definition.

The matrix is read once. Tiling: as many thread blocks as there are multiprocessors, in clusters of
`splits`. A cluster loops over tiles of `blocks` x 64 columns; each of its thread blocks multiplies
one part of K. Copies (TMA) of weights run `stages` steps ahead, on into the next tiles, so that
most of `flight` bytes are always asked for. The first ones are asked for before x is read.

Products are [64 columns, K] [K, 8 rows] on tensor cores, with weights and rows both in shared
memory. The tensor cores read 64 x 16 weights in 16 cycles; a multiprocessor's part of the memory's
rate brings them in about 150. CUDA cores would need 108 of their 128 multiply-adds a cycle for 16
rows, beside conversions and loads. Nine to sixteen rows are two products of eight: each row's
result has the same bits whatever the number of rows and whatever is in the others.

Where a following matrix is known, thread blocks that have multiplied their own weights ask for
pieces of it to be brought into the L2 cache: until the next kernel has begun and its first weights
have come, the memory would be idle for 4 us.

The norm costs no pass. x is multiplied by the norm's weight when it enters shared memory; each
thread block sums the squares of its part; the factor of a row multiplies its finished sums.

Each thread block writes its sums [64, 8] into the shared memory of the cluster's first block, which
adds them in order of K, adds the bias, applies gate and residual, and writes the result. The
cluster's barrier is passed twice a tile: when all have written, and when the first has read. Thread
blocks run ahead by what they have asked for meanwhile.

Traffic: 2 K N bytes (twice that if gated). x is read by each thread block from the L2 cache, 2 K
bytes a row at most. Floor: 90 MB of gates and ups 2048 x 11008 take 29.7 us at 3.04 TB/s.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic_gpu import (
    Products,
    across,
    cluster_arrive,
    cluster_wait,
    full,
    load,
    spread,
    transposed,
)
from pallas_kernels.projection.api import sizes
from pallas_kernels.projection.hopper.plan import (
    BLOCK,
    GROUP,
    PIECE,
    ROWS,
    Ahead,
    Plan,
    ahead,
    choose,
)

SUMS = plgpu.Layout.WGMMA
BY_COLUMN, BY_ROW = SUMS.reduce(1), SUMS.reduce(0)
# A piece of x: each thread has the same four inputs of all rows.
X = plgpu.Layout.TILED(
    plgpu.Tiling(((GROUP, PIECE), (128,), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
)
# A row of a result: the same in each warp.
OUT = plgpu.Layout.TILED(
    plgpu.Tiling(((4, BLOCK), (2,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
).reduce(0)

f32 = jnp.float32


def supports(
    x, weight, bias=None, residual=None, norm=None, prefetch=None, eps=1e-6, transposed=False
) -> str | None:
    """Returns the reason it does not take these arrays (or shapes with dtypes), else None."""
    if not 1 <= x.shape[0] <= ROWS:
        return f"{x.shape[0]} rows: 1 to {ROWS}"
    for name, array in (("x", x), ("weight", weight), ("residual", residual)):
        if array is not None and array.dtype != jnp.bfloat16:
            return f"{name} of {array.dtype}: bfloat16 only"
    plan = choose(*sizes(weight, transposed), weight.ndim == 3)
    return plan if isinstance(plan, str) else None


# A model's layers share one compiled kernel.
@partial(jax.jit, static_argnames=("eps", "transposed", "plan"))
def projection(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    norm: jax.Array | None = None,
    prefetch: jax.Array | None = None,
    eps: float = 1e-6,
    transposed: bool = False,
    plan: Plan | None = None,
) -> jax.Array:
    """The contract of `pallas_kernels.projection.projection`, for some sizes of arrays.

    plan: None chooses one. Raises ValueError where `supports` gives a reason or the plan does not
    fit.
    """
    (inputs, outputs), gated = sizes(weight, transposed), weight.ndim == 3
    reason = supports(x, weight, bias, residual, norm, prefetch, eps, transposed)
    if reason is None and plan is not None:
        reason = plan.refusal(len(x), inputs, outputs, gated)
    if reason:
        raise ValueError(
            f"the projection on Hopper does not take {reason}\n  -> use the implementation xla"
        )
    plan = plan or choose(inputs, outputs, gated)
    named = {"x": x, "weight": weight, "bias": bias, "residual": residual, "norm": norm}
    named["prefetch"] = prefetch
    given = {name: array for name, array in named.items() if array is not None}
    kernel = Kernel(plan, len(x), inputs, outputs, gated, eps, transposed)
    if prefetch is not None:
        pair = prefetch.ndim == 3
        following = ahead(*sizes(prefetch, False), pair, prefetch.dtype.itemsize)
        kernel = replace(kernel, ahead=following)

    def entry(*refs):
        kernel.run(dict(zip(given, refs, strict=False)), *refs[len(given) :])

    return plgpu.kernel(
        entry,
        out_type=jax.ShapeDtypeStruct((len(x), outputs), x.dtype),
        grid=(kernel.clusters,),
        grid_names=("cluster",),
        cluster=(plan.splits,),
        cluster_names=("part",),
        scratch_types=kernel.memory(),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="projection",
    )(*given.values())


@dataclass(frozen=True)
class Kernel:
    """The kernel for certain sizes: what one thread block does."""

    plan: Plan
    rows: int
    inputs: int
    outputs: int
    gated: bool
    eps: float
    transposed: bool
    ahead: Ahead | None = None

    @property
    def groups(self) -> int:
        return -(-self.rows // GROUP)

    @property
    def blocks(self) -> int:
        """Of 64 columns of the matrix in a tile: gates and ups are two."""
        return self.plan.blocks * (2 if self.gated else 1)

    @property
    def tiles(self) -> int:
        return self.outputs // (BLOCK * self.plan.blocks)

    @property
    def clusters(self) -> int:
        return min(self.tiles, self.plan.clusters)

    @property
    def part(self) -> int:
        """Inputs that a thread block multiplies."""
        return self.inputs // self.plan.splits

    @property
    def steps(self) -> int:
        return self.part // self.plan.rows

    def memory(self) -> list:
        """Shared memory: tiles, x, sums of all parts, their squares, a tile's result, barriers."""
        tiled = plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(128)
        tile = (BLOCK, self.plan.rows) if self.transposed else (self.plan.rows, BLOCK)
        stages = self.plan.stages(self.rows, self.inputs, self.gated)
        splits = self.plan.splits
        return [
            plgpu.SMEM((stages, self.blocks, *tile), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((self.groups, GROUP, self.part), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((splits, self.blocks, self.groups, BLOCK, GROUP), f32),
            plgpu.SMEM((splits, self.groups, GROUP), f32),
            plgpu.SMEM((self.plan.blocks, self.groups, GROUP, BLOCK), f32),
            plgpu.Barrier(num_arrivals=self.blocks, num_barriers=stages),
        ]

    def run(self, refs, out, w_smem, x_smem, sums_smem, squares_smem, out_smem, ready):
        cluster, part = lax.axis_index("cluster"), lax.axis_index("part")
        count = lax.div(self.tiles - cluster + self.clusters - 1, self.clusters)
        stages, depth = w_smem.shape[0], self.plan.rows

        def fetch(i):
            """Asks for the weights of step i, counted over all tiles."""

            @pl.when(i < count * self.steps)
            def _():
                at, tile = lax.rem(i, stages), cluster + lax.div(i, self.steps) * self.clusters
                k = pl.ds((part * self.steps + lax.rem(i, self.steps)) * depth, depth)
                for block in range(self.blocks):
                    source = self.weights(refs["weight"], tile, block, k)
                    plgpu.copy_gmem_to_smem(source, w_smem.at[at, block], ready.at[at])

        for i in range(stages):
            fetch(jnp.int32(i))
        self.read_x(refs, part, x_smem, squares_smem)
        self.arrive()

        @pl.loop(0, count)
        def _tile(t):
            tile = cluster + t * self.clusters
            bias, residual = self.read_others(refs, tile)  # early: used when the sums are done

            def multiply(*sums):
                @pl.loop(0, self.steps)
                def _step(c):
                    i = t * self.steps + c
                    at = lax.rem(i, stages)
                    plgpu.barrier_wait(ready.at[at])
                    k = pl.ds(c * depth, depth)
                    rows = [transposed(x_smem.at[g, :, k]) for g in range(self.groups)]
                    weights = [w_smem.at[at, block] for block in range(self.blocks)]
                    if not self.transposed:
                        weights = [transposed(w) for w in weights]
                    products = Products()
                    pairs = [(w, x) for w in weights for x in rows]
                    for acc, (w, x) in zip(sums, pairs, strict=True):
                        products.add(acc, w, x)
                    products.run_on(len(pairs))  # the last step's are done
                    plgpu.commit_smem()  # in all warps
                    pl.when(i > 0)(lambda: fetch(i - 1 + stages))

                products = Products()
                return [products.wait(acc) for acc in sums]

            shape = plgpu.ACC((BLOCK, GROUP), f32)
            sums = lax.optimization_barrier(
                pl.run_scoped(multiply, *[shape] * (self.blocks * self.groups))
            )
            if self.ahead is not None:
                pl.when(t == count - 1)(
                    lambda: self.prefetch(refs["prefetch"], cluster * self.plan.splits + part)
                )
            self.wait()  # the first block has read the last tile's sums
            for i, x in enumerate(sums):
                self.first(sums_smem).at[part, i // self.groups, i % self.groups][...] = x
            self.arrive()
            self.wait()

            @pl.when(part == 0)
            def _():
                factors = self.factors(squares_smem) if "norm" in refs else None
                self.finish(sums_smem, factors, bias, out_smem)
                self.write(out_smem, residual, out, tile)

            plgpu.commit_smem()  # all warps have passed the barrier
            self.arrive()

        self.wait()

    def weights(self, ref, tile, block, k):
        """64 columns of a tile: with gates and ups, first those of the gates."""
        pair, block = divmod(block, self.plan.blocks)
        columns = self.columns(tile, block)
        if self.transposed:
            return ref.at[pair, columns, k] if self.gated else ref.at[columns, k]
        return ref.at[k, pair, columns] if self.gated else ref.at[k, columns]

    def prefetch(self, ref, place) -> None:
        """Asks for a thread block's pieces of the following matrix. place: its number."""
        ahead, count = self.ahead, self.clusters * self.plan.splits

        @pl.loop(0, -(-ahead.pieces // count))
        def _piece(turn):
            piece = turn * count + place
            row, block = ahead.place(piece)
            k = pl.ds(row, ahead.rows)

            @pl.when(piece < ahead.pieces)
            def _():
                if len(ref.shape) == 3:
                    pair, column = lax.rem(block, 2), lax.div(block, 2)
                    plgpu.async_prefetch(ref.at[k, pair, pl.ds(column * BLOCK, BLOCK)])
                else:
                    plgpu.async_prefetch(ref.at[k, pl.ds(block * BLOCK, BLOCK)])

    def columns(self, tile, block):
        return pl.ds((tile * self.plan.blocks + block) * BLOCK, BLOCK)

    def read_x(self, refs, part, x_smem, squares_smem) -> None:
        """Puts this part of x, times the norm's weight, into shared memory, and sums of its squares
        into that of the first block."""
        # The last piece may begin in the one before it.
        pieces = range(-(-self.part // PIECE))
        starts = [min(piece * PIECE, self.part - PIECE) for piece in pieces]
        places = [pl.ds(part * self.part + start, PIECE) for start in starts]
        # All loads of a group of rows come first: a store into shared memory waits for all warps.
        weights = [load(refs["norm"].at[k], X.reduce(0)) for k in places if "norm" in refs]
        for group in range(self.groups):
            rows = range(group * GROUP, min(self.rows, (group + 1) * GROUP))
            loaded = [[load(refs["x"].at[r, k], X.reduce(0)) for r in rows] for k in places]
            squares = full((GROUP,), 0.0, X.reduce(1))
            for piece, start in zip(pieces, starts, strict=True):
                row = plgpu.broadcasted_iota(jnp.int32, (GROUP, PIECE), 0, layout=X)
                x = full((GROUP, PIECE), 0.0, X)
                for r, values in zip(rows, loaded[piece], strict=True):
                    x = jnp.where(row == r - group * GROUP, self.over_rows(values.astype(f32)), x)
                if "norm" in refs:
                    column = plgpu.broadcasted_iota(jnp.int32, (GROUP, PIECE), 1, layout=X)
                    fresh = jnp.where(column >= piece * PIECE - start, x, 0.0)
                    squares = squares + jnp.sum(fresh * fresh, axis=1)
                    x = x * self.over_rows(weights[piece].astype(f32))
                x_smem[group, :, pl.ds(start, PIECE)] = x.astype(jnp.bfloat16)
            if "norm" in refs:
                self.first(squares_smem).at[part, group][...] = squares
        plgpu.commit_smem()

    def read_others(self, refs, tile):
        """Bias of each block of columns, and residual by block and row."""
        bias, residual = [], []
        if "bias" in refs:
            for block in range(self.blocks):
                pair, own = divmod(block, self.plan.blocks)
                ref = refs["bias"].at[pair] if self.gated else refs["bias"]
                bias.append(load(ref.at[self.columns(tile, own)], BY_COLUMN).astype(f32))
        if "residual" in refs:
            for block in range(self.plan.blocks):
                columns = self.columns(tile, block)
                residual.append(
                    [load(refs["residual"].at[r, columns], OUT) for r in range(self.rows)]
                )
        return bias, residual

    def factors(self, squares_smem) -> list:
        """1 / root mean square of each row, for all columns, by group."""
        found = []
        for group in range(self.groups):
            squares = sum(
                load(squares_smem.at[part, group], BY_ROW) for part in range(self.plan.splits)
            )
            factor = lax.rsqrt(squares / self.inputs + self.eps)
            found.append(plgpu.layout_cast(across(factor, BLOCK), SUMS))
        return found

    def finish(self, sums_smem, factors, bias, out_smem) -> None:
        """Adds the parts' sums, in order, and puts them with norm, bias and gate into out_smem."""
        for group in range(self.groups):
            found = []
            for block in range(self.blocks):
                y = sum(
                    load(sums_smem.at[part, block, group], SUMS) for part in range(self.plan.splits)
                )
                y = y if factors is None else y * factors[group]
                if bias:
                    y = y + plgpu.layout_cast(spread(bias[block], GROUP), SUMS)
                found.append(y)
            for block in range(self.plan.blocks):
                y = found[block]
                if self.gated:
                    y = y / (1 + jnp.exp(-y)) * found[self.plan.blocks + block]
                transposed(out_smem.at[block, group])[...] = plgpu.layout_cast(
                    y, plgpu.Layout.WGMMA_TRANSPOSED
                )
        plgpu.commit_smem()

    def write(self, out_smem, residual, out, tile) -> None:
        for block in range(self.plan.blocks):
            for row in range(self.rows):
                y = load(out_smem.at[block, row // GROUP, row % GROUP], OUT)
                if residual:
                    y = y + residual[block][row].astype(f32)
                out[row, self.columns(tile, block)] = y.astype(out.dtype)

    def first(self, ref):
        """The shared memory of the cluster's first block."""
        return ref if self.plan.splits == 1 else plgpu.cluster_ref(ref, {"part": 0})

    def arrive(self) -> None:
        """A cluster of one block needs none: its own stores and loads are in order."""
        if self.plan.splits > 1:
            cluster_arrive()

    def wait(self) -> None:
        if self.plan.splits > 1:
            cluster_wait()

    @staticmethod
    def over_rows(x):
        """A number for each input, for all rows."""
        return plgpu.layout_cast(across(x, GROUP), X)
