"""What is compiled to run a model, for calls of it, batches and engines alike.

Every sequence is decoded by `decode`, in launches of some steps, and every token chosen by
`sampling.choose`. What is idle stands still. A program compiles once for every shape that it meets;
those that choose tokens, once more where some are sampled.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from infinitevl_jax.inputs.model_inputs import DecoderInputs, text_inputs
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.serve.sampling import choose
from infinitevl_jax.serve.slots import Beginning, Chunk, Slots
from infinitevl_jax.sharding import constrain

STEPS = 8  # decoding steps a launch, where tokens are not wanted one by one


def on_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """Within, programs are for this mesh (None: one device)."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


class Programs:
    """The compiled functions of one model. Those marked * use up the cache or slots they get.

    Attributes:
      encode(params, patches): vision tokens [rows, tokens, width].
      merge(vision, encoded, index): * as the function of that name below.
      forward: as the function of that name below, `model` left out.
      begin(slots, logits, sampled): as the function of that name below.
      decode, prefill, enter: * as the functions of those names below, `model` left out.
      take(cache, slot): the cache of one sequence.
      put(cache, slot, row): * the cache with that of one sequence in it.
      stop(slots, slot): * the slots, this one idle.
    """

    def __init__(self, model: Callable, platform: str | None = None):
        """
        Args:
          model: model(params) is a VLM that has these parameters.
          platform: what is compiled for, such as "gpu"; None: this process's devices.
        """
        once, repeated = compiler_options(platform or jax.default_backend())
        self.encode = jax.jit(
            lambda params, patches: model(params).encode(patches), compiler_options=repeated
        )
        self.merge = jax.jit(merge, donate_argnums=0)
        self.forward = jax.jit(
            jax.named_scope("prefill")(partial(forward, model)),
            static_argnames="collect",
            compiler_options=once,
        )
        self.begin = jax.jit(begin, static_argnames="sampled")
        self.decode = jax.jit(
            partial(decode, model),
            static_argnames=("steps", "sampled"),
            donate_argnames=("cache", "slots"),
            compiler_options=repeated,
        )
        self.prefill = jax.jit(
            jax.named_scope("prefill")(partial(prefill, model)),
            donate_argnames="cache",
            compiler_options=repeated,
        )
        self.enter = jax.jit(
            partial(enter, model), static_argnames="sampled", donate_argnames="slots"
        )
        self.take = jax.jit(lambda cache, slot: cache.select(slot[None]))
        self.put = jax.jit(_put, donate_argnums=0)
        self.stop = jax.jit(_stop, donate_argnums=0)


def compiler_options(platform: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of whole prompts, and of short programs that repeat: steps, chunks of prompts, frames.

    XLA for GPUs makes one CUDA graph of many kernels. The host launches a graph faster than its
    kernels one by one, and again twice as fast where all arrays are where they were in the last
    call (`infinitevl_jax.serve.staging`). The kernels of a whole prompt run longer than either. A
    kernel that reads a part of an array in place (a dynamic slice fusion) would have the graph
    updated in every call.
    """
    if platform != "gpu":
        return {}, {}
    return (
        {"xla_gpu_graph_min_graph_size": 1 << 30},
        {"xla_gpu_enable_dynamic_slice_fusion": False},
    )


def forward(
    model: Callable,
    params: Mapping[str, Array],
    inputs: DecoderInputs,
    embeds: Array | None,
    cache: Cache | None,
    keep: Array | None = None,
    collect: bool = False,
):
    """One decoder call.

    Args:
      embeds: vision tokens, as for `VLM.embed`.
      keep: [batch, n] int32, the places in each row whose logits are wanted; None wants all.
      collect: whether to return hidden states.

    Returns:
      Logits [batch, length or n, vocab] f32, the new cache, hidden states.
    """
    vlm = model(params)
    x, states = vlm.embed(inputs, embeds), []
    if cache is not None and x.shape[1] == 1 and not collect:
        logits, cache = vlm.step(x, inputs, cache)
        logits = logits if keep is None else jnp.take_along_axis(logits, keep[..., None], 1)
    else:
        hidden, cache, states = vlm.decode(x, inputs, cache, collect)
        if keep is not None:
            hidden = jnp.take_along_axis(hidden, keep[..., None], 1)
        logits = vlm.logits(hidden)
    return logits.astype(jnp.float32), cache, states


def begin(slots: Slots, logits: Array, *, sampled: bool = True) -> tuple[Slots, Array]:
    """Choose the first token of each sequence: logits [slots, vocab] of their last token so far ->
    slots that `decode` goes on with, tokens [slots].

    `slots.occurred` may be None: nothing occurred. sampled: as for `sampling.choose`.
    """
    if slots.occurred is None:
        slots = slots._replace(occurred=jnp.zeros(logits.shape, bool))
    return _choose(slots, logits, slots.left > 0, sampled)


def decode(
    model: Callable,
    params: Mapping[str, Array],
    cache: Cache,
    slots: Slots,
    *,
    steps: int,
    sampled: bool = True,
) -> tuple[Cache, Slots, Array]:
    """A launch: append each sequence's token to its cache and choose the next, `steps` times.

    The last token of a sequence is not appended. A sequence that has ended stands still. sampled:
    as for `sampling.choose`, of the sequences that have not.

    Returns:
      The new cache and slots, and tokens [steps, slots] int32: -1 where none was chosen.
    """

    def step(carry: tuple[Cache, Slots], _) -> tuple[tuple[Cache, Slots], Array]:
        cache, slots, token = decode_step(model, params, *carry, sampled)
        return (cache, slots), token

    # A fixed count: a GPU would ask the host after each step whether to go on.
    (cache, slots), tokens = jax.lax.scan(step, (cache, slots), None, length=steps)
    return cache, slots, tokens


@jax.named_scope("decode")
def decode_step(
    model: Callable,
    params: Mapping[str, Array],
    cache: Cache,
    slots: Slots,
    sampled: bool = True,
) -> tuple[Cache, Slots, Array]:
    """One step of `decode`: the new cache and slots, and tokens [slots] int32, -1 of idle ones."""
    busy = slots.left > 0
    inputs = text_inputs(slots.token[:, None])
    inputs = inputs._replace(token_index=jnp.where(busy, 0, -1)[:, None])
    vlm = model(params)
    logits, cache = vlm.step(vlm.embed(inputs, None), inputs, cache)
    slots, token = _choose(slots, logits[:, 0].astype(jnp.float32), busy, sampled)
    return cache, slots, token


def prefill(
    model: Callable, params: Mapping[str, Array], cache: Cache, chunk: Chunk
) -> tuple[Cache, Array]:
    """Read a piece of some prompts into their slots.

    Returns:
      The new cache, and the hidden states [rows, 1, width] of the pieces' last tokens.
    """
    held = jnp.minimum(chunk.slot, len(cache.length) - 1)

    def of_row(leaf):
        fresh = chunk.first.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(fresh, 0, leaf[held])

    before = jax.tree.map(of_row, cache)
    vlm, inputs = model(params), chunk.inputs
    hidden, after, _ = vlm.decode(vlm.embed(inputs, chunk.vision), inputs, before)
    ending = jnp.maximum(jnp.max(inputs.token_index, 1, keepdims=True), 0)
    hidden = jnp.take_along_axis(hidden, ending[..., None], 1)
    cache = jax.tree.map(lambda leaf, new: leaf.at[chunk.slot].set(new, mode="drop"), cache, after)
    return cache, hidden


def enter(
    model: Callable,
    params: Mapping[str, Array],
    slots: Slots,
    hidden: Array,
    beginning: Beginning,
    *,
    sampled: bool = True,
) -> tuple[Slots, Array]:
    """Choose the first token of sequences whose prompt has been read.

    Args:
      hidden: of `prefill`.
      sampled: as for `sampling.choose`.

    Returns:
      The new slots, and tokens [rows] int32: -1 where none was chosen.
    """
    logits = model(params).logits(hidden)[:, 0].astype(jnp.float32)
    begun, token = _choose(beginning.slots, logits, beginning.last, sampled)
    where = jnp.where(beginning.last, beginning.slot, len(slots.token))
    slots = jax.tree.map(lambda leaf, new: leaf.at[where].set(new, mode="drop"), slots, begun)
    return slots, token


def merge(vision: Array | None, encoded: Array, index: Array) -> Array:
    """Vision tokens [1, chunk, width] of a chunk (None: zeros), with those that have a place
    `index` [chunk] in `encoded` [1, tokens, width]; -1: none."""
    found = encoded[0][jnp.maximum(index, 0)]
    if vision is None:
        vision = jnp.zeros((1, *found.shape), found.dtype)
    return jnp.where(index[None, :, None] >= 0, found[None], vision)


def _choose(slots: Slots, logits: Array, busy: Array, sampled: bool) -> tuple[Slots, Array]:
    """The next token of each busy slot; -1 of the others, which stay as they are.

    logits: [slots, vocab].
    """
    token = choose(logits, slots.seed, slots.made, slots.settings, slots.occurred, sampled)
    ended = jnp.any(token[:, None] == slots.ends, 1)
    left = jnp.where(ended, 0, slots.left - 1)
    said = jnp.asarray(slots.occurred).at[jnp.arange(len(token)), token].max(busy)
    slots = slots._replace(
        token=jnp.where(busy, token, slots.token),
        left=jnp.where(busy, left, slots.left),
        made=slots.made + busy,
        occurred=said,
    )
    # one sharding, so that launches that follow one another are one program
    slots = jax.tree.map(lambda leaf: constrain(leaf, "batch", *[None] * (leaf.ndim - 1)), slots)
    return slots, jnp.where(busy, token, -1)


def _put(cache: Cache, slot: Array, row: Cache) -> Cache:
    return jax.tree.map(lambda leaf, new: leaf.at[slot].set(new[0]), cache, row)


def _stop(slots: Slots, slot: Array) -> Slots:
    return slots._replace(left=slots.left.at[slot].set(0))
