"""One-token step of a Gated DeltaNet layer on Hopper GPUs, from its projections to the input of its
output projection, in one kernel of Pallas Mosaic GPU. `pallas_kernels.gated_delta_rule.step.step`
is the definition.

Tiling: a thread block of 128 threads owns 32 values of one head of one sequence: K x 32 numbers of
the state, read once, kept in registers and written once. The V / 32 thread blocks of a head are a
cluster. The state is requested first. Meanwhile each thread block computes the convolutions of its
32 values and, one channel a thread, of the head's whole q and k, which go through shared memory.
k^T S and q^T S are summed together: out = decay q^T S + (q.k) u does not need the new state.

The norm of the head's output needs one exchange between thread blocks. Each writes its sum of
squares into the shared memory of all, and passes the cluster's barrier when all have. The same
barrier keeps the conv states of q and k, which all thread blocks of a head read, from being
overwritten too early. It also keeps a thread block from ending while another may write into it. It
is the hardware's barrier, by inline assembly. JAX's ClusterBarrier does not order earlier stores
into other thread blocks: a block sometimes ended too early and the launch failed. A block cannot
arrive at it again before all its warps have passed, or one waits forever.

Traffic: the state once in each direction, 8 K V bytes a head. All else is 2 % of that. Floor: 4 MiB
for 16 heads of 128 x 256, 1.4 us at 3 TB/s, and 89 us for 64 sequences.

The parity matrix checks this kernel, on a GPU or interpreted. benchmarks/decode.py times it
(benchmarks/results/decode.jsonl).
"""

from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.columns import Columns
from pallas_kernels.gated_delta_rule.api import Inputs, Weights
from pallas_kernels.gated_delta_rule.state import DeltaState
from pallas_kernels.gated_delta_rule.tuning import HopperStep as Tuning
from pallas_kernels.mosaic_gpu import cluster_arrive, cluster_wait, load

KEYS = 128  # width of a key: one channel a thread
COLUMNS = Tuning.columns
VECTOR = 4  # numbers that a thread loads at once, at a multiple of their size

# Four warps by four rows by eight groups of four columns: each row of the block is one line of
# memory.
BLOCK = plgpu.Layout.TILED(
    plgpu.Tiling(((16, 32), (4, 32), (4,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)
BY_ROW, BY_COLUMN = BLOCK.reduce(1), BLOCK.reduce(0)
BY_THREAD = plgpu.Layout.WG_STRIDED((KEYS,), vec_size=1)

f32 = jnp.float32


def supports(inputs: Inputs, weights: Weights, state: DeltaState, *_, **__) -> str | None:
    """Returns the reason it does not take these arrays (or shapes with dtypes), else None."""
    _, heads, keys, values = state.recurrent_state.shape
    if inputs.q.shape[1] != heads * keys:
        return f"{inputs.q.shape[1] // keys} key heads for {heads} value heads: as many of each"
    if keys != KEYS:
        return f"keys {keys} wide: {KEYS} only"
    if values % COLUMNS or values > 8 * COLUMNS:
        return f"values {values} wide: a multiple of {COLUMNS}, at most {8 * COLUMNS}"
    if any(x.dtype != jnp.bfloat16 for x in (*inputs, *state[1:])):
        return "inputs or conv states that are not bfloat16"
    if not all(x.aligned(VECTOR) for x in inputs[:4] if isinstance(x, Columns)):
        return f"columns of rows that do not begin at multiples of {VECTOR}"
    if state.recurrent_state.dtype != f32:
        return f"a recurrent state of {state.recurrent_state.dtype}: float32 only"
    if any(len(x) != 4 for x in weights[:3]):
        return f"{len(weights.q_conv)} taps: 4 only"
    return None


@partial(jax.jit, static_argnames="eps")  # a model's layers share one compiled kernel
def step(
    inputs: Inputs, weights: Weights, state: DeltaState, token_index: jax.Array, eps: float
) -> tuple[jax.Array, DeltaState]:
    """The contract of `pallas_kernels.gated_delta_rule.step.step`, for one layout of arrays.

    Under jit the state is updated in place where its caller donates it. Raises ValueError where
    `supports` gives a reason.
    """
    if reason := supports(inputs, weights, state):
        raise ValueError(
            f"the token step on Hopper does not take {reason}\n  -> use the implementation xla"
        )
    batch, heads, keys, values = state.recurrent_state.shape
    parts = values // COLUMNS
    # Where these are parts of a larger array, XLA may pass pointers into it (JAX 0.11.2), which
    # Mosaic GPU refuses unless they are multiples of 256 bytes. A cast makes arrays of their own.
    a, b = (x if isinstance(x, Columns) else x.astype(f32) for x in (inputs.a, inputs.b))
    inputs = inputs._replace(a=a, b=b)
    refs = DeltaState(*(jax.new_ref(x) for x in state))

    def kernel(
        inputs, weights, index_ref, state, out_ref, memory_smem, unit_smem, sum_smem, arrived
    ):
        work, part = lax.axis_index("work"), lax.axis_index("part")
        b, head = lax.div(work, heads), lax.rem(work, heads)
        whole = pl.ds(head * keys, keys)  # the head's channels of q and k
        # This block's part of v, the gate and the output.
        slice_ = pl.ds(head * values + part * COLUMNS, COLUMNS)
        columns = pl.ds(part * COLUMNS, COLUMNS)
        mine = state.recurrent_state.at[b, head, :, columns]

        def own(x, start, count):
            """Channels of the sequence, of a whole array or of columns of one."""
            ref, first = (x.array, x.start) if isinstance(x, Columns) else (x, 0)
            return ref.at[b, pl.ds(first + start, count)]

        def number(x):
            """The head's."""
            ref, first = (x.array, x.start) if isinstance(x, Columns) else (x, 0)
            return ref[b, first + head]

        def ask(x_ref, tail_ref, weight_ref, where, layout):
            """The four inputs of a convolution and their weights."""
            rows = [load(tail_ref.at[b, tap, where], layout) for tap in range(3)] + [
                load(own(x_ref, where.start, where.size), layout)
            ]
            return rows, [load(weight_ref.at[tap, where], layout) for tap in range(4)]

        def convolve(rows, taps):
            terms = [row.astype(f32) * tap.astype(f32) for row, tap in zip(rows, taps, strict=True)]
            return silu(terms[0] + terms[1] + terms[2] + terms[3])

        def unit(x, scale):
            return x * (lax.rsqrt(jnp.sum(x * x) + 1e-6) * scale)

        # The slowest loads are issued first. The compiler moves nothing up past the branch.
        real = index_ref[b] >= 0
        v_rows, v_taps = ask(inputs.v, state.v_conv_state, weights.v_conv, slice_, BY_COLUMN)
        gate, norm = (
            load(own(inputs.gate, slice_.start, COLUMNS), BY_COLUMN),
            load(weights.norm.at[columns], BY_COLUMN),
        )
        scalars = number(inputs.a), number(inputs.b), weights.A_log[head], weights.dt_bias[head]
        pl.when(real)(lambda: plgpu.copy_gmem_to_smem(mine, memory_smem, arrived))
        q_rows, q_taps = ask(inputs.q, state.q_conv_state, weights.q_conv, whole, BY_THREAD)
        k_rows, k_taps = ask(inputs.k, state.k_conv_state, weights.k_conv, whole, BY_THREAD)

        q, k = unit(convolve(q_rows, q_taps), keys**-0.5), unit(convolve(k_rows, k_taps), 1.0)
        unit_smem[0], unit_smem[1] = q, k
        overlap = jnp.sum(q * k)
        v = convolve(v_rows, v_taps)
        step_size, strength, rate, bias = (x.astype(f32) for x in scalars)
        decay = jnp.exp(-jnp.exp(rate) * softplus(step_size + bias))
        beta = 1 / (1 + jnp.exp(-strength))
        plgpu.commit_smem()
        q, k = (spread(load(unit_smem.at[i], BY_ROW), 0) for i in range(2))

        @pl.when(real)
        def _take():
            plgpu.barrier_wait(arrived)
            recurrent_state = load(memory_smem, BLOCK)
            update = beta * (v - decay * jnp.sum(k * recurrent_state, axis=0))
            out = decay * jnp.sum(q * recurrent_state, axis=0) + overlap * update
            squares = jnp.sum(out * out)
            for other in range(parts):
                plgpu.cluster_ref(sum_smem, {"part": other})[part] = squares
            cluster_arrive()
            mine[...] = decay * recurrent_state + k * spread(update, 1)
            scale = norm.astype(f32) * silu(gate.astype(f32))
            cluster_wait()
            mean = sum(sum_smem[other] for other in range(parts)) / values
            out_ref[b, slice_] = (out * lax.rsqrt(mean + eps) * scale).astype(out_ref.dtype)
            for tap in range(3):
                state.v_conv_state[b, tap, slice_] = v_rows[tap + 1]
                pl.when(part == 0)(
                    lambda tap=tap: put(state.q_conv_state.at[b, tap, whole], q_rows[tap + 1])
                )
                pl.when(part == parts - 1)(
                    lambda tap=tap: put(state.k_conv_state.at[b, tap, whole], k_rows[tap + 1])
                )

        @pl.when(jnp.logical_not(real))
        def _stand():
            out_ref[b, slice_] = plgpu.layout_cast(jnp.zeros(COLUMNS, out_ref.dtype), BY_COLUMN)

    def entry(*refs):
        pl.run_scoped(
            lambda *scratch: kernel(*refs, *scratch),
            plgpu.SMEM((KEYS, COLUMNS), f32),
            plgpu.SMEM((2, KEYS), f32),
            plgpu.SMEM((parts,), f32),
            plgpu.Barrier(),
        )

    mesh = plgpu.Mesh(
        grid=(batch * heads,), grid_names=("work",), cluster=(parts,), cluster_names=("part",)
    )
    parameters = plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
    )
    # Not plgpu.kernel, which takes no references.
    run = pl.kernel(
        entry,
        jax.ShapeDtypeStruct((batch, heads * values), inputs.v.dtype),
        mesh=mesh,
        compiler_params=parameters,
        name="gated_delta_rule_step",
    )
    out = run(inputs, weights, token_index, refs)
    return out, DeltaState(*(ref[...] for ref in refs))


def put(ref, x):
    ref[...] = x


def spread(x, axis):
    """Broadcasts a number for each row (axis 0) or column (axis 1) over the block."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, (KEYS, COLUMNS), [axis]), BLOCK)


def silu(x):
    return x / (1 + jnp.exp(-x))


def softplus(x):
    """log(1 + e^x). The quotient corrects for what 1 + y rounds away of a small y."""
    y = jnp.exp(-jnp.abs(x))
    whole = 1 + y
    small = jnp.where(whole == 1, y, jnp.log(whole) * (y / jnp.maximum(whole - 1, 1e-30)))
    return jnp.maximum(x, 0) + small
