"""One-token step of attention on Hopper GPUs, in Pallas Mosaic GPU.
`pallas_kernels.attention.step.step` is the definition.

Tiling: a thread block is one warpgroup. It loops over blocks of `keys` cache slots of one key head
of one sequence, every `splits`-th of them, for all query heads of that key head. `splits` is chosen
so that the thread blocks about fill the GPU. Copies (TMA) of keys and values run `stages` blocks
ahead. Blocks of empty slots are not read. Scores are [keys, heads]: the tensor cores multiply 64
keys by 8 heads, instead of 64 heads of which 8 are used. The weights go through shared memory, and
v^T weights gives the output as [D, heads].

The first thread block of a key head starts with the new token, while its copies are in flight, and
writes it into the cache. Another thread block may read that slot, but it is outside its window. A
second kernel, one thread block a head, merges the parts by their log-sum-exp: 8 D bytes read for
each part, from the L2 cache, and 2 D written.

Traffic: each filled slot once, 4 D bytes a key head. The parts pass through the L2 cache. Floor: 8
MiB for 8192 slots of 2 key heads 128 wide, 2.8 us at 3 TB/s, and 179 us for 64 sequences.
"""

import math
from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.state import KVCache
from pallas_kernels.attention.tuning import HopperStep as Tuning
from pallas_kernels.mosaic_gpu import load, multiply, transposed

WIDTH = 128
LOWEST = -1e30  # running maximum before the first key: finite, so that -inf - LOWEST is no NaN

f32 = jnp.float32


def supports(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_cache: KVCache,
    token_index=None,
    window: int | None = None,
    scale: float | None = None,
    sinks: int = 0,
) -> str | None:
    """Returns the reason it does not take these arrays (or shapes with dtypes), else None."""
    _, capacity, key_heads, width = kv_cache.k.shape
    group, odd = divmod(q.shape[1], key_heads)
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v, *kv_cache)):
        return "arrays that are not bfloat16"
    if width != WIDTH or kv_cache.v.shape != kv_cache.k.shape:
        return f"heads {width} and {kv_cache.v.shape[3]} wide: {WIDTH} only"
    if odd or group % 8:
        return f"{q.shape[1]} query heads on {key_heads} key heads: a multiple of 8 on each"
    if capacity % Tuning.keys:
        return f"a cache of {capacity} slots: a multiple of {Tuning.keys}"
    if sinks:
        return "sinks outside the window"
    if scale is not None and not scale > 0:
        return f"scale {scale}: positive only"
    return None


@partial(
    jax.jit, static_argnames=("window", "scale", "sinks")
)  # a model's layers share one compiled kernel
def step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_cache: KVCache,
    token_index: jax.Array,
    window: int | None = None,
    scale: float | None = None,
    sinks: int = 0,
) -> tuple[jax.Array, KVCache]:
    """The contract of `pallas_kernels.attention.step.step`, for one layout of arrays.

    Under jit the cache is updated in place where its caller donates it. Raises ValueError where
    `supports` gives a reason.
    """
    if reason := supports(q, k, v, kv_cache, token_index, window, scale, sinks):
        raise ValueError(
            f"the token step on Hopper does not take {reason}\n  -> use the implementation xla"
        )
    scale = q.shape[2] ** -0.5 if scale is None else scale
    refs = KVCache(*(jax.new_ref(x) for x in kv_cache))
    window = min(window or kv_cache.k.shape[1], kv_cache.k.shape[1])
    parts = attention_parts(q, k, v, refs, kv_cache.k.shape, token_index, window, scale)
    return merge_parts(parts, token_index, q.dtype), KVCache(*(ref[...] for ref in refs))


def attention_parts(q, k, v, kv_cache, cache_shape, token_index, window, scale):
    """[batch, key heads, splits, 2, group, D] float32: the output of each split's keys alone,
    and their log-sum-exp to base 2 in every column. Writes the new token into the cache."""
    batch, capacity, key_heads, width = cache_shape
    group, keys = q.shape[1] // key_heads, Tuning.keys
    tiles = capacity // keys
    splits = min(tiles, 1 << int(math.log2(max(1, Tuning.blocks // (batch * key_heads)))))
    stages = min(Tuning.stages, -(-tiles // splits))
    log2_scale = scale * math.log2(math.e)
    by_key, by_head = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    # One head a warp, for the only product of this kernel that is not a matrix product.
    heads_of_warps = plgpu.Layout.TILED(
        plgpu.Tiling(((4, 128), (4,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )
    channels = heads_of_warps.reduce(0)

    def kernel(q_ref, k_ref, v_ref, index_ref, kv_cache, parts_ref, smem, barriers):
        q_smem, k_smem, v_smem, weights_smem, own_smem = smem
        q_ready, k_ready, v_ready = barriers
        work, split = lax.axis_index("work"), lax.axis_index("split")
        b, key_head = lax.div(work, key_heads), lax.rem(work, key_heads)
        heads = pl.ds(key_head * group, group)
        token_index = index_ref[b]
        real = token_index >= 0
        # Blocks with a token in them.
        live = lax.div(jnp.clip(token_index, 0, capacity) + keys - 1, keys)
        count = lax.div(jnp.maximum(live - split, 0) + splits - 1, splits)
        slot = lax.rem(jnp.maximum(token_index, 0), capacity)

        def fetch(i):
            @pl.when(i < count)
            def _():
                at = lax.rem(i, stages)
                where = b, pl.ds((split + i * splits) * keys, keys), key_head
                plgpu.copy_gmem_to_smem(kv_cache.k.at[where], k_smem.at[at], k_ready.at[at])
                plgpu.copy_gmem_to_smem(kv_cache.v.at[where], v_smem.at[at], v_ready.at[at])

        plgpu.copy_gmem_to_smem(q_ref.at[b, heads], q_smem, q_ready)
        for i in range(stages):
            fetch(i)

        q_rows, k_row, v_row = (
            load(q_ref.at[b, heads], heads_of_warps),
            load(k_ref.at[b, key_head], channels),
            load(v_ref.at[b, key_head], channels),
        )
        own = jnp.sum(
            q_rows.astype(f32) * spread(k_row.astype(f32), (group, width), 1, heads_of_warps),
            axis=1,
        )
        own_smem[...] = own * log2_scale
        plgpu.commit_smem()
        first = (split == 0) & real

        @pl.when(first)
        def _join():
            kv_cache.k[b, slot, key_head] = k_row
            kv_cache.v[b, slot, key_head] = v_row

        # The first split starts from the new token, the others from nothing.
        mine = first.astype(f32)
        top = load(own_smem, by_head) * mine + (1 - mine) * LOWEST
        value = load(v_ref.at[b, key_head], by_key).astype(f32)
        acc = over_keys(value * mine, group)
        row = plgpu.broadcasted_iota(jnp.int32, (keys, group), 0, layout=plgpu.Layout.WGMMA)
        total = jnp.where(row == 0, mine, 0.0)
        plgpu.barrier_wait(q_ready)

        def block(i, carry):
            acc, top, total = carry
            at = lax.rem(i, stages)
            plgpu.barrier_wait(k_ready.at[at])

            scores = multiply((keys, group), (k_smem.at[at], transposed(q_smem)))
            age = slot - (row + (split + i * splits) * keys)
            age = jnp.where(age <= 0, age + capacity, age)
            scores = jnp.where((age <= token_index) & (age < window), scores * log2_scale, -jnp.inf)
            new = jnp.maximum(top, scores.max(axis=0))
            weights = jnp.exp2(scores - over_heads(new, keys))
            factor = jnp.exp2(top - new)
            total = total * over_heads(factor, keys) + weights
            weights = plgpu.layout_cast(weights.astype(q.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            transposed(weights_smem)[...] = weights
            plgpu.commit_smem()
            pl.when(i > 0)(lambda: fetch(i - 1 + stages))  # all warps are done with the last block
            plgpu.barrier_wait(v_ready.at[at])

            acc = multiply(
                acc * over_heads(factor, width),
                (transposed(v_smem.at[at]), transposed(weights_smem)),
            )
            return acc, new, total

        acc, top, total = lax.fori_loop(0, count, block, (acc, top, total))
        total = jnp.sum(total, axis=0)
        lse = top + jnp.log2(total)
        inverse = jnp.where(total > 0, 1 / total, 0.0)
        for i, x in enumerate((acc * over_heads(inverse, width), over_heads(lse, width))):
            transposed(parts_ref.at[b, key_head, split, i])[...] = plgpu.layout_cast(
                x, plgpu.Layout.WGMMA_TRANSPOSED
            )

    def entry(*refs):
        tiled = plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)

        def shared(*shape):
            return plgpu.SMEM(shape, q.dtype, transforms=tiled)

        pl.run_scoped(
            lambda *scratch: kernel(*refs, *scratch),
            (
                shared(group, width),
                shared(stages, keys, width),
                shared(stages, keys, width),
                shared(group, keys),
                plgpu.SMEM((group,), f32),
            ),
            (
                plgpu.Barrier(),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
            ),
        )

    out_type = jax.ShapeDtypeStruct((batch, key_heads, splits, 2, group, width), f32)
    mesh = plgpu.Mesh(grid=(batch * key_heads, splits), grid_names=("work", "split"))
    parameters = plgpu.CompilerParams(approx_math=True)
    # Not plgpu.kernel, which takes no references.
    return pl.kernel(entry, out_type, mesh=mesh, compiler_params=parameters, name="attention_step")(
        q, k, v, token_index, kv_cache
    )


def merge_parts(parts, token_index, dtype):
    """out [batch, heads, D] in dtype."""
    batch, key_heads, splits, _, group, width = parts.shape
    heads = key_heads * group
    by_column = plgpu.Layout.TILED(
        plgpu.Tiling(((1, 128), (32,), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1
    )

    def kernel(parts_ref, index_ref, out_ref):
        work = lax.axis_index("work")
        b, head = lax.div(work, heads), lax.rem(work, heads)
        if splits == 1:
            merged = load(
                parts_ref.at[b, lax.div(head, group), 0, 0, lax.rem(head, group)],
                by_column.reduce(0),
            ).astype(dtype)
        else:
            mine = b, lax.div(head, group), slice(None)
            out, lse = (
                load(parts_ref.at[*mine, i, lax.rem(head, group)], by_column) for i in range(2)
            )
            weights = jnp.exp2(lse - spread(lse.max(axis=0), (splits, width), 1, by_column))
            merged = (jnp.sum(weights * out, axis=0) / jnp.sum(weights, axis=0)).astype(dtype)
        real = index_ref[b] >= 0

        @pl.when(real)
        def _():
            out_ref[b, head] = merged

        @pl.when(jnp.logical_not(real))
        def _():
            out_ref[b, head] = plgpu.layout_cast(jnp.zeros(width, dtype), by_column.reduce(0))

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, heads, width), dtype),
        grid=(batch * heads,),
        grid_names=("work",),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="attention_step_merge",
    )(parts, token_index)


def over_heads(x, rows):
    """A number for each head, in all rows."""
    return spread(x, (rows, x.shape[0]), 1, plgpu.Layout.WGMMA)


def over_keys(x, heads):
    """A number for each row, for all heads."""
    return spread(x, (x.shape[0], heads), 0, plgpu.Layout.WGMMA)


def spread(x, shape, axis, layout):
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [axis]), layout)
