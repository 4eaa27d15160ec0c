"""Rows in tokens."""

from typing import NamedTuple

import numpy as np

from infinitevl_jax.inputs.batch import TokenSequence


class Branch(NamedTuple):
    """A question and its answer, as they follow the image; or a whole conversation."""

    tokens: np.ndarray  # [length] int32
    answer: np.ndarray  # [length] bool, True for an answer's tokens and its end of turn
    turn: tuple[str, str]  # question and answer as text; empty for a whole conversation

    @property
    def inputs(self) -> TokenSequence:
        """What the model reads: the last token is only predicted."""
        return TokenSequence(self.tokens[:-1])

    @property
    def question(self) -> TokenSequence:
        """The tokens before the answer."""
        return TokenSequence(self.tokens[: int(np.argmax(self.answer))])


class EncodedRow(NamedTuple):
    """A row as an image and questions about it."""

    prefix: TokenSequence  # up to the image's end marker, the same for every question
    branches: list[Branch]


class EncodedConversation(NamedTuple):
    """A conversation of several turns, or a document or a part of one."""

    branch: Branch
    pixels: np.ndarray | None = None  # [patches, features] f32
    grids: np.ndarray | None = None  # [images, 3] int32
    video_pixels: np.ndarray | None = None
    video_grids: np.ndarray | None = None
    seconds: np.ndarray | None = None
    document: bool = False  # it may be divided

    @property
    def inputs(self) -> TokenSequence:
        return TokenSequence(self.branch.tokens[:-1], *self[1:-1])

    @property
    def tokens(self) -> int:
        """Tokens that it takes in a row."""
        return len(self.branch.tokens) - 1

    @property
    def patches(self) -> int:
        """Patches that it takes in a row."""
        return sum(len(p) for p in (self.pixels, self.video_pixels) if p is not None)
