"""Sequences side by side on the device: what each slot of the engine holds, and the programs that
move them on.

Every program has one shape, whatever the requests: a prefill chunk of `rows` prompts, and a launch
of several decoding steps of all slots. What is idle stands still.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from infinitevl_jax.inputs.model_inputs import DecoderInputs, text_inputs
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.serve.prompt import Piece
from infinitevl_jax.serve.sampling import Settings, choose_rows

ENDS = 16  # ids that may end a sequence, at most


class Slots(NamedTuple):
    """What decoding knows of each sequence, beside its cache: arrays [slots, ...], of numpy on the
    host and of jax on the device."""

    token: Any  # int32 chosen, and not yet in the cache
    left: Any  # int32 tokens still to be chosen; 0: the slot is idle
    made: Any  # int32 tokens chosen so far
    seed: Any  # [slots, 2] uint32 seed and row of the request
    ends: Any  # [slots, ENDS] int32 ids that end the sequence, -1: none
    occurred: Any  # [slots, vocab] bool ids that the sequence holds
    settings: Settings

    @classmethod
    def idle(cls, count: int, vocab: int) -> "Slots":
        """`count` slots without a sequence (on the host)."""
        zeros = np.zeros(count, np.int32)
        return cls(
            zeros,
            zeros,
            zeros,
            np.zeros((count, 2), np.uint32),
            np.full((count, ENDS), -1, np.int32),
            np.zeros((count, vocab), bool),
            Settings.greedy(count),
        )


class Chunk(NamedTuple):
    """A piece of each of `rows` prompts."""

    inputs: DecoderInputs  # [rows, chunk]
    vision: Array | None  # [rows, chunk, width] where `inputs.vision_index` is not -1
    slot: np.ndarray  # [rows] int32; the number of slots where a row is unused
    first: np.ndarray  # [rows] bool: the slot's cache counts as empty
    last: Any  # [rows] bool: the piece is the prompt's last
    begin: Slots  # [rows]: what the slot becomes after the last piece, `token` to be chosen


def join_pieces(
    pieces: Sequence[tuple[Piece, int, bool, Slots | None]], rows: int, slots: int, vocab: int
) -> Chunk:
    """One chunk of several prompts' pieces.

    Args:
      pieces: piece, slot, whether the slot's cache counts as empty, and what the slot becomes after
        the prompt's last piece (None: nothing is to be chosen).
      rows: of the chunk; those without a piece stand still.
      slots, vocab: of the engine.
    """
    idle = rows - len(pieces)

    def joined(name: str) -> np.ndarray:
        axis = 1 if name == "positions" else 0
        parts = [np.asarray(getattr(piece.inputs, name)) for piece, *_ in pieces]
        fill = -1 if name in ("token_index", "vision_index") else 0
        return np.concatenate(parts + [np.full_like(parts[0], fill)] * idle, axis)

    inputs = DecoderInputs(**{name: joined(name) for name in DecoderInputs._fields})
    vision = next((piece.vision for piece, *_ in pieces if piece.vision is not None), None)
    if vision is not None and rows > 1:
        blank = jnp.zeros_like(vision)
        given = [blank if piece.vision is None else piece.vision for piece, *_ in pieces]
        vision = jnp.concatenate(given + [blank] * idle)
    nothing = Slots.idle(1, vocab)
    begins = [nothing if begin is None else begin for *_, begin in pieces] + [nothing] * idle
    return Chunk(
        inputs,
        vision,
        np.array([slot for _, slot, *_ in pieces] + [slots] * idle, np.int32),
        np.array([fresh for *_, fresh, _ in pieces] + [False] * idle),
        np.array(
            [piece.last and begin is not None for piece, *_, begin in pieces] + [False] * idle
        ),
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *begins),
    )


class Programs(NamedTuple):
    """The compiled functions of an engine. Those that return a cache or slots use theirs up."""

    encode: Callable  # (params, patches) -> [1, tokens, width]
    merge: Callable  # (vision [1, chunk, width], encoded, index [chunk]) -> vision
    prefill: Callable  # (params, cache, slots, chunk) -> cache, slots, first tokens [rows]
    decode: Callable  # (params, cache, slots) -> cache, slots, tokens [steps, slots]
    take: Callable  # (cache, slot) -> the cache of one sequence
    put: Callable  # (cache, slot, the cache of one sequence) -> cache
    stop: Callable  # (slots, slot) -> slots


def compile_programs(model: Callable, steps: int) -> Programs:
    """The programs of a model; each compiles at its first call.

    Args:
      model: parameters -> VLM. steps: decoding steps a launch.
    """
    return Programs(
        encode=jax.jit(lambda params, patches: model(params).encode(patches)),
        merge=jax.jit(_merge, donate_argnums=0),
        prefill=jax.jit(partial(_prefill, model), donate_argnums=(1, 2)),
        decode=jax.jit(partial(_decode, model, steps), donate_argnums=(1, 2)),
        take=jax.jit(_take),
        put=jax.jit(_put, donate_argnums=0),
        stop=jax.jit(_stop, donate_argnums=0),
    )


def _merge(vision: Array, encoded: Array, index: Array) -> Array:
    """Vision tokens of a chunk, with those whose place in `encoded` [1, tokens, width] is known."""
    found = encoded[0][jnp.maximum(index, 0)].astype(vision.dtype)
    return jnp.where(index[None, :, None] >= 0, found[None], vision)


def _prefill(
    model: Callable, params: Mapping[str, Array], cache: Cache, slots: Slots, chunk: Chunk
) -> tuple[Cache, Slots, Array]:
    vlm = model(params)
    count = len(slots.token)
    held = jnp.minimum(chunk.slot, count - 1)

    def of_row(leaf):
        fresh = chunk.first.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(fresh, 0, leaf[held])

    before = jax.tree.map(of_row, cache)
    embedded = vlm.embed(chunk.inputs, chunk.vision)
    hidden, after, _ = vlm.decode(embedded, chunk.inputs, before)
    cache = jax.tree.map(lambda leaf, new: leaf.at[chunk.slot].set(new, mode="drop"), cache, after)
    ending = jnp.maximum(jnp.max(chunk.inputs.token_index, 1, keepdims=True), 0)
    logits = vlm.logits(jnp.take_along_axis(hidden, ending[..., None], 1))[:, 0]
    begin, token = _choose(chunk.begin, logits, chunk.last)
    where = jnp.where(chunk.last, chunk.slot, count)
    slots = jax.tree.map(lambda leaf, new: leaf.at[where].set(new, mode="drop"), slots, begin)
    return cache, slots, token


def _decode(
    model: Callable, steps: int, params: Mapping[str, Array], cache: Cache, slots: Slots
) -> tuple[Cache, Slots, Array]:
    vlm = model(params)

    def step(carry, _):
        cache, slots = carry
        busy = slots.left > 0
        inputs = text_inputs(slots.token[:, None])
        inputs = inputs._replace(token_index=jnp.where(busy, 0, -1)[:, None])
        hidden, cache, _ = vlm.decode(vlm.embed(inputs, None), inputs, cache)
        slots, token = _choose(slots, vlm.logits(hidden)[:, 0], busy)
        return (cache, slots), token

    (cache, slots), tokens = jax.lax.scan(step, (cache, slots), length=steps)
    return cache, slots, tokens


def _choose(slots: Slots, logits: Array, busy: Array) -> tuple[Slots, Array]:
    """The next token of each busy slot; -1 of the others, which stay as they are.

    logits: [slots, vocab].
    """
    token = choose_rows(logits, slots.seed, slots.made, slots.settings, slots.occurred)
    ended = jnp.any(token[:, None] == slots.ends, 1)
    left = jnp.where(ended, 0, slots.left - 1)
    said = slots.occurred.at[jnp.arange(len(token)), token].max(busy)
    slots = slots._replace(
        token=jnp.where(busy, token, slots.token),
        left=jnp.where(busy, left, slots.left),
        made=slots.made + busy,
        occurred=said,
    )
    return slots, jnp.where(busy, token, -1)


def _take(cache: Cache, slot: Array) -> Cache:
    return cache.select(slot[None])


def _put(cache: Cache, slot: Array, row: Cache) -> Cache:
    return jax.tree.map(lambda leaf, new: leaf.at[slot].set(new[0]), cache, row)


def _stop(slots: Slots, slot: Array) -> Slots:
    return slots._replace(left=slots.left.at[slot].set(0))
