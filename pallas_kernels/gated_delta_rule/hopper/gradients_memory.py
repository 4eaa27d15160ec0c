"""What the three warpgroups of the gradients kernel share: the chunks that a thread block takes,
shared memory and barriers."""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_delta_rule.hopper.chunk_scan_backward import CHUNK, ROWS
from pallas_kernels.gated_delta_rule.hopper.spans import KEY, WIDTH
from pallas_kernels.gated_delta_rule.tuning import HopperGradients as Tuning

D_BETA, PRODUCT, D_GATE, D_BETA_TOO, SUMS = range(5)  # rows of what is summed for each token
STAGES = Tuning.stages
SQUARE, WIDE = (CHUNK, CHUNK), (CHUNK, KEY)
LAST = CHUNK - 1

f32, bf16 = jnp.float32, jnp.bfloat16


class Refs(NamedTuple):
    """Arrays in global memory: inputs, then results."""

    q: Any
    k: Any
    v: Any
    d_out: Any
    inverse: Any
    states: Any
    x: Any
    d_states: Any
    vectors: Any
    zero: Any  # [1] int32, a 0 that the compiler does not know
    dq: Any
    dk: Any
    dv: Any
    sums: Any


class Memory(NamedTuple):
    """Shared memory of a thread block. q has one place; the other inputs have STAGES."""

    q: Any
    k: Any
    inverse: Any
    vectors: Any
    v: Any
    d_out: Any
    x: Any
    states: Any
    d_states: Any
    work: Any  # of the queries' warpgroup: beta (V - d K S), then dv, then the low half of dP * D
    new: Any  # from queries to keys: `new` of each slice, then E, as two bfloat16
    sums: Any
    row: Any


class Barriers(NamedTuple):
    """ready: filled. free: may be overwritten. Chunks, slices and `new` have STAGES places."""

    chunk_ready: Any  # k, T, vectors
    chunk_free: Any
    q_ready: Any
    q_free: Any
    slice_ready: Any  # v, d_out, x, states, d_states
    slice_free: Any
    new_ready: Any
    new_free: Any
    scores_ready: Any  # dP * D, in the place of T and in `work`
    scores_read: Any
    k_read: Any


class Work(NamedTuple):
    """The chunks of a thread block: `first`, `first + blocks`, ... of all `items`, which are
    ordered by batch, chunk, head."""

    first: jax.Array
    chunks: jax.Array  # how many
    blocks: int
    heads: int
    count: int  # chunks of a row
    slices: int  # of 64 columns of the state

    def place(self, j) -> tuple:
        """Row, head and chunk of the j-th chunk: rows of all heads together."""
        item = self.first + j * self.blocks
        return (
            lax.div(item, self.count * self.heads),
            lax.rem(item, self.heads),
            lax.rem(lax.div(item, self.heads), self.count),
        )


def work_of(items: int, blocks: int, heads: int, count: int, slices: int) -> Work:
    """Inside the kernel: the work of this thread block."""
    first = lax.axis_index("work")
    return Work(first, lax.div(items - 1 - first, blocks) + 1, blocks, heads, count, slices)


def columns(s) -> pl.Slice:
    """The columns of slice s."""
    return pl.ds(s * WIDTH, WIDTH)


def memory() -> Memory:
    """The types to allocate."""

    def shared(*shape):
        return plgpu.SMEM(
            shape, bf16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
        )

    return Memory(
        q=shared(*WIDE),
        k=shared(STAGES, *WIDE),
        inverse=shared(STAGES, *SQUARE),
        vectors=plgpu.SMEM((STAGES, ROWS, CHUNK), f32),
        v=shared(STAGES, CHUNK, WIDTH),
        d_out=shared(STAGES, CHUNK, WIDTH),
        x=shared(STAGES, CHUNK, WIDTH),
        states=shared(STAGES, KEY, WIDTH),
        d_states=shared(STAGES, WIDTH, KEY),
        work=shared(*SQUARE),
        new=shared(STAGES, 2, *SQUARE),
        sums=plgpu.SMEM((SUMS, CHUNK), f32),
        row=plgpu.SMEM((CHUNK,), f32),
    )


def barriers() -> Barriers:
    """The types to allocate."""
    return Barriers(
        chunk_ready=plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
        chunk_free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        q_ready=plgpu.Barrier(),
        q_free=plgpu.Barrier(),
        slice_ready=plgpu.Barrier(num_arrivals=5, num_barriers=STAGES),
        slice_free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
        new_ready=plgpu.Barrier(num_barriers=STAGES),
        new_free=plgpu.Barrier(num_barriers=STAGES),
        scores_ready=plgpu.Barrier(),
        scores_read=plgpu.Barrier(),
        k_read=plgpu.Barrier(),
    )
