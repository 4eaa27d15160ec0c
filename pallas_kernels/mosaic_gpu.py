"""Shared helpers of the Mosaic GPU kernels for Hopper: asynchronous products, vectors and layouts
in registers, the barrier of a cluster."""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

NEW = jax.__version_info__ >= (0, 11)


class Products:
    """Matrix products of one warpgroup (wgmma), which run asynchronously until they are waited for.

    Every wgmma of the kernels is issued here. A left factor in registers has to stay in them until
    its product is done. LLVM does not know that, so `wait` uses the factor once more, after the
    wait.

    A left factor in registers must depend on data in each of its elements. Where ptxas (13.0) knows
    the value of an element, it may set that register between two products that both read it. The
    first product then reads the old value. Seen on an H100 with a triangle of ones whose corners
    are the same for all threads: gradients of gates were wrong at random, up to NaN.
    `testing/sass.py` finds this in the machine code.

    A wait covers the products of the warp that waits. Before a kernel overwrites a tile in shared
    memory that these products read, all warps of the warpgroup have to synchronise. A store through
    a reference (`ref[...] = x`) does so before and after, and so does `commit_smem`. A copy from
    another warpgroup has to wait at a barrier that this warpgroup arrives at.
    """

    def __init__(self):
        # Left factors of products that may still run, in order of issue. None: in shared memory.
        self._left = []

    def add(self, acc, left: jax.Array | object, right: object) -> None:
        """Start acc += left @ right. left: an array (registers) or a reference to shared memory;
        right: a reference."""
        plgpu.wgmma(acc, left, right)
        self._left.append(left if isinstance(left, jax.Array) else None)

    def wait(self, acc, running: int = 0) -> jax.Array:
        """The sum in `acc`, once all products but the `running` last ones are done."""
        result = plgpu.wgmma_accumulator_load(acc, wait_n=running)
        count = max(len(self._left) - running, 0)
        done, self._left = self._left[:count], self._left[count:]
        kept = [x for x in done if x is not None]
        return lax.optimization_barrier((result, *kept))[0]

    def run_on(self, running: int) -> None:
        """Waits until all but the `running` last ones are done. Factors are in shared memory."""
        assert not any(x is not None for x in self._left), "a factor in registers: use wait"
        plgpu.wgmma_wait(running)

    def take(self, acc) -> jax.Array:
        """The sum in `acc` of products that a `wait` has already covered."""
        return plgpu.wgmma_accumulator_load(acc, wait_n=None)


def multiply(start: jax.Array | tuple[int, int], *factors: tuple) -> jax.Array:
    """start (or zeros of that shape) + the sum of the pairs' products, float32 in registers."""
    seeded = not isinstance(start, tuple)

    def run(acc):
        if seeded:
            acc[...] = start
        products = Products()
        for left, right in factors:
            products.add(acc, left, right)
        return products.wait(acc)

    return lax.optimization_barrier(
        pl.run_scoped(run, plgpu.ACC(start.shape if seeded else start, jnp.float32))
    )


def load(ref, layout, optimized: bool = False) -> jax.Array:
    """Loads a vector into registers. optimized: must be False for a load from global memory, where
    Mosaic GPU counts no transfer of these layouts as optimized."""
    index = () if NEW else ((),)
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def spread(x: jax.Array, columns: int) -> jax.Array:
    """Broadcasts a number for each row over all columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def across(x: jax.Array, rows: int) -> jax.Array:
    """Broadcasts a number for each column over all rows."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def full(shape: tuple[int, ...], value: float, layout) -> jax.Array:
    """A constant float32 array in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def transposed(ref):
    """Shared memory read as [columns, rows]."""
    return ref.transpose((1, 0)) if NEW else plgpu.transpose_ref(ref, (1, 0))


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 x as a sum of two float32. The first is x with its lower bits cut off, which bfloat16
    holds exactly; cutting is cheaper than rounding."""
    high = lax.bitcast_convert_type(
        lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536), jnp.float32
    )
    return high, x - high


def rounded_halves(x: jax.Array) -> list[jax.Array]:
    """`halves` in bfloat16."""
    return [half.astype(jnp.bfloat16) for half in halves(x)]


def nearest_halves(x: jax.Array) -> list[jax.Array]:
    """As `rounded_halves`, with the first rounded to the nearest, for where it is used alone."""
    high = x.astype(jnp.bfloat16)
    return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


@plgpu.inline_mgpu()
def cluster_arrive(_):
    """Arrives at the cluster's barrier. Stores of this thread, also into other blocks, are visible
    to all that wait."""
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [],
        "barrier.cluster.arrive.release;",
        "~{memory}",
        has_side_effects=True,
    )


@plgpu.inline_mgpu()
def cluster_wait(_):
    """Waits until all threads of the cluster have arrived."""
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [],
        "barrier.cluster.wait.acquire;",
        "~{memory}",
        has_side_effects=True,
    )
