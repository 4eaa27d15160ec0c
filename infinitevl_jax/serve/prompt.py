"""Prompts of an engine in pieces of one shape."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from infinitevl_jax.inputs.model_inputs import DecoderInputs, ModelInputs, cut_tokens
from infinitevl_jax.serve.encoding import GroupEncoder
from infinitevl_jax.serve.slots import Piece


@dataclass(frozen=True)
class PromptReader:
    """Cuts the prompts of an engine.

    Attributes:
      chunk: tokens of a piece.
    """

    chunk: int
    encoder: GroupEncoder

    def pieces(self, inputs: ModelInputs, start: int) -> Iterator[Piece]:
        """The pieces of a prompt of one sequence.

        start: position of the first token where the inputs have none: text that follows a cache.
        """
        count, decoder = int(inputs.counts[0]), _filled(inputs.decoder, start)
        starts = range(0, count, self.chunk)
        parts = (cut_tokens(decoder, at, min(at + self.chunk, count), self.chunk) for at in starts)
        for at, (part, vision) in zip(starts, self.encoder(inputs.patches, parts), strict=True):
            yield Piece(part, vision, at + self.chunk >= count)


def _filled(decoder: DecoderInputs, start: int) -> DecoderInputs:
    """A prompt with positions, from `start` where it has none, and vision_index."""
    shape, positions, vision_index = decoder.tokens.shape, decoder.positions, decoder.vision_index
    if positions is None:
        counted = start + np.arange(shape[1], dtype=np.int32)
        positions = np.broadcast_to(counted, (3, *shape))
    if vision_index is None:
        vision_index = np.full(shape, -1, np.int32)
    return decoder._replace(positions=positions, vision_index=vision_index)
