"""Leaves NaN in freed memory between two calls of a kernel that must give the same result.

The allocator hands freed memory to the next program that asks for as much. Buffers of the sizes of
a program's results and temporaries, filled and freed, are therefore what its next call gets. Shared
memory keeps what the last kernel on a multiprocessor left there.
"""

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hardware import hopper

WIDTH = 4096  # of the matrices that are multiplied: 32 MB each in bfloat16
NAN = -1  # whose bits, all set, are NaN in every floating dtype
ROWS, PIECE = 448, 64  # of 512 bytes: 224 KB of a multiprocessor's 227
BLOCKS = 1024  # several times as many as a GPU has multiprocessors, each of which holds one


def sizes(program: jax.stages.Compiled) -> tuple[int, ...]:
    """Bytes of the buffers that a compiled program asks for: its results, and one for all its
    temporaries."""
    results = [x.size * x.dtype.itemsize for x in jax.tree.leaves(program.out_info)]
    memory = program.memory_analysis()
    return *results, *([] if memory is None else [memory.temp_size_in_bytes])


def work(sizes: Sequence[int], device: jax.Device):
    """The function of no arguments to compile and call between calls. Its results are to be
    dropped. The same object for the same sizes."""
    return _work(
        tuple(sorted(n for n in sizes if n)),
        hopper(device) is None,
        256 if device.platform == "cpu" else WIDTH,
    )


@cache
def _work(sizes: tuple[int, ...], shared: bool, width: int):
    def run():
        rows, columns = (lax.broadcasted_iota(jnp.float32, (width, width), axis) for axis in (0, 1))
        x = jnp.sin(rows + 2 * columns).astype(jnp.bfloat16)
        product = jnp.sum(x @ x @ x, dtype=jnp.float32)
        fills = [jnp.full(-(-n // 4), NAN, jnp.int32) for n in sizes]
        return product, fills, poison_shared_memory() if shared else None

    return run


def poison_shared_memory() -> jax.Array:
    """Fills the shared memory of every multiprocessor of a Hopper GPU with NaN."""

    def kernel(out_ref, memory_ref):
        block = lax.axis_index("block")

        @pl.loop(0, ROWS // PIECE)
        def _(piece):
            memory_ref[pl.ds(piece * PIECE, PIECE)] = jnp.full((PIECE, 128), NAN, jnp.int32)

        plgpu.commit_smem()
        # read back, so that no compiler takes the stores for useless
        plgpu.copy_smem_to_gmem(memory_ref.at[lax.rem(block, ROWS)], out_ref.at[block])
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((BLOCKS, 128), jnp.int32),
        grid=(BLOCKS,),
        grid_names=("block",),
        scratch_types=[plgpu.SMEM((ROWS, 128), jnp.int32)],
        kernel_name="poison_shared_memory",
    )()
