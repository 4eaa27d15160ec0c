"""A prompt in pieces of one shape, its images and videos encoded group by group on the way.

Memory follows the piece and the group, not the prompt: a group is a run of temporal slices with at
most so many patches, encoded when the first piece needs it and dropped after the last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from infinitevl_jax.inputs.frame import Frame
from infinitevl_jax.inputs.model_inputs import DecoderInputs, ModelInputs, cut_tokens
from infinitevl_jax.inputs.patches import Patches, bucket


class Piece(NamedTuple):
    """`chunk` tokens of a prompt, padded at the end."""

    inputs: DecoderInputs  # [1, chunk]; positions and vision_index are always there
    vision: Array | None  # [1, chunk, width], None where the piece has no images
    last: bool


@dataclass(frozen=True)
class PromptReader:
    """How prompts are cut and encoded.

    Attributes:
      chunk: tokens of a piece.
      group: patches encoded at once, at most; a temporal slice is never divided.
      unit: patches of a vision token.
      width, dtype: of the decoder's activations.
      encode: patches -> [1, tokens, width].
      merge: as `infinitevl_jax.serve.programs.merge`.
    """

    chunk: int
    group: int
    unit: int
    width: int
    dtype: np.dtype
    encode: Callable[[Patches | Frame], Array]
    merge: Callable[[Array, Array, np.ndarray], Array]

    def pieces(self, inputs: ModelInputs, start: int) -> Iterator[Piece]:
        """The pieces of a prompt of one sequence.

        start: position of the first token where the inputs have none: text that follows a cache.
        """
        count, groups = int(inputs.counts[0]), []
        decoder = _filled(inputs.decoder, start)
        if inputs.patches is not None:
            groups = _groups(inputs.patches, self.group, self.unit)
        encoded: dict[int, Array] = {}
        for at in range(0, count, self.chunk):
            stop = min(at + self.chunk, count)
            piece = cut_tokens(decoder, at, stop, self.chunk)
            index, vision = np.asarray(piece.vision_index)[0], None
            if (index >= 0).any():
                vision = jnp.zeros((1, self.chunk, self.width), self.dtype)
                for number, (tokens, patches) in enumerate(groups):
                    inside = (index >= tokens.start) & (index < tokens.stop)
                    if not inside.any():
                        encoded.pop(number, None)
                        continue
                    if number not in encoded:
                        encoded[number] = self.encode(patches())
                    place = np.where(inside, index - tokens.start, -1).astype(np.int32)
                    vision = self.merge(vision, encoded[number], place)
                own = np.where(index >= 0, np.arange(self.chunk), -1)
                piece = piece._replace(vision_index=own[None].astype(np.int32))
            yield Piece(piece, vision, stop == count)


def _filled(decoder: DecoderInputs, start: int) -> DecoderInputs:
    """A prompt with positions, from `start` where it has none, and vision_index."""
    shape, positions, vision_index = decoder.tokens.shape, decoder.positions, decoder.vision_index
    if positions is None:
        counted = start + np.arange(shape[1], dtype=np.int32)
        positions = np.broadcast_to(counted, (3, *shape))
    if vision_index is None:
        vision_index = np.full(shape, -1, np.int32)
    return decoder._replace(positions=positions, vision_index=vision_index)


def _groups(
    patches: Patches | Frame, most: int, unit: int
) -> list[tuple[range, Callable[[], Patches | Frame]]]:
    """Runs of whole temporal slices: the tower's tokens that each gives, and how to make it.

    patches: one packed row, or a frame, which is one slice.
    """
    if isinstance(patches, Frame):
        return [(range(patches.layout.patch_index.shape[1] // unit), lambda: patches)]
    valid = int((patches.patch_index[0] >= 0).sum())
    ids = patches.slice_ids[0, :valid]
    ends = [*np.flatnonzero(np.diff(ids)) + 1, valid] if valid else []
    found, begin, before = [], 0, 0
    for end in ends:
        if end - begin > most and before > begin:
            found.append((begin, before))
            begin = before
        before = end
    if valid:
        found.append((begin, valid))
    return [(range(a // unit, b // unit), _Cut(patches, a, b)) for a, b in found]


@dataclass(frozen=True)
class _Cut:
    """Patches `start` to `stop` of a packed row as a packed row of their own."""

    patches: Patches
    start: int
    stop: int

    def __call__(self) -> Patches:
        count = self.stop - self.start
        more = bucket(count) - count

        def cut(x: np.ndarray, fill: int) -> np.ndarray:
            padding = [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2)
            return np.pad(x[:, self.start : self.stop], padding, constant_values=fill)

        p = self.patches
        index = np.pad(np.arange(count, dtype=np.int32), (0, more), constant_values=-1)
        return Patches(
            pixels=cut(p.pixels, 0),
            row_column=cut(p.row_column, 0),
            patch_index=index[None],
            window_ids=cut(p.window_ids, -1),
            slice_ids=cut(p.slice_ids, -1),
            slice_reach=p.slice_reach,
        )
