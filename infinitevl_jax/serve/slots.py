"""Sequences side by side on the device: what decoding knows of each, and what a chunk of their
prompts is."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from infinitevl_jax.inputs.model_inputs import DecoderInputs
from infinitevl_jax.serve.generation import Request
from infinitevl_jax.serve.sampling import Settings

ENDS = 16  # ids that may end a sequence: room for so many, or a multiple


class Piece(NamedTuple):
    """`chunk` tokens of a prompt, padded at the end."""

    inputs: DecoderInputs  # [1, chunk]; positions and vision_index are always there
    vision: Array | None  # [1, chunk, width], None where the piece has no images
    last: bool


class Slots(NamedTuple):
    """What decoding knows of each sequence, beside its cache: arrays [slots, ...], of numpy on the
    host and of jax on the device."""

    token: Any  # int32 chosen, and not yet in the cache
    left: Any  # int32 tokens still to be chosen; 0: the slot is idle
    made: Any  # int32 tokens chosen so far
    seed: Any  # [slots, 2] uint32 seed and row of the request
    ends: Any  # [slots, multiple of ENDS] int32 ids that end the sequence, -1: none
    occurred: Any  # [slots, vocab] bool ids that the sequence holds, for repetition_penalty
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

    @classmethod
    def beginning(cls, request: Request, count: int, occurred: np.ndarray | None) -> "Slots":
        """`count` sequences of one request whose first token is to be chosen (on the host)."""
        zeros = np.zeros(count, np.int32)
        ends = np.full((count, -(-max(len(request.ends), 1) // ENDS) * ENDS), -1, np.int32)
        ends[:, : len(request.ends)] = request.ends
        seed = np.full(count, request.seed, np.uint32), np.arange(count, dtype=np.uint32)
        return cls(
            zeros,
            np.full(count, request.max_new_tokens, np.int32),
            zeros,
            np.stack(seed, 1),
            ends,
            occurred,
            Settings.of([request.sampling] * count),
        )


class Chunk(NamedTuple):
    """A piece of each of `rows` prompts."""

    inputs: DecoderInputs  # [rows, chunk]
    vision: Array | None  # [rows, chunk, width] where `inputs.vision_index` is not -1
    slot: np.ndarray  # [rows] int32; the number of slots where a row is unused
    first: np.ndarray  # [rows] bool: the slot's cache counts as empty


class Beginning(NamedTuple):
    """Prompts whose last piece a chunk holds."""

    slot: np.ndarray  # [rows] int32, as of the chunk
    last: Any  # [rows] bool: the row's piece is the last, and tokens are to be chosen
    slots: Slots  # [rows]: what the slot becomes, `token` to be chosen


def join_pieces(
    pieces: Sequence[tuple[Piece, int, bool, Slots | None]], rows: int, slots: int, vocab: int
) -> tuple[Chunk, Beginning | None]:
    """One chunk of several prompts' pieces, and the prompts that end in it, if any.

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
    slot = np.array([slot for _, slot, *_ in pieces] + [slots] * idle, np.int32)
    first = np.array([fresh for *_, fresh, _ in pieces] + [False] * idle)
    chunk = Chunk(inputs, vision, slot, first)
    begun = [begin if piece.last else None for piece, *_, begin in pieces] + [None] * idle
    last = np.array([begin is not None for begin in begun])
    if not last.any():
        return chunk, None
    nothing = Slots.idle(1, vocab)
    filled = [begin or nothing for begin in begun]
    together = jax.tree.map(lambda *leaves: np.concatenate(leaves), *filled)
    return chunk, Beginning(slot, last, together)
