"""What a task makes, and what it makes it from."""

from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from infinitevl_jax.data.drawing.fonts import Fonts
from infinitevl_jax.data.drawing.words import Words


class Scene(NamedTuple):
    """Pictures, and questions about them with their answers, in the order in which they are asked.

    What the pictures show decides each answer."""

    pictures: list[Image.Image]
    turns: list[tuple[str, str]]


@dataclass(frozen=True)
class Supplies:
    """What tasks draw with.

    Attributes:
      size: largest side of a picture in pixels.
      frames: largest number of pictures in a conversation of the task "recall".
      ago: of the task "recall": the card asked for was shown so many pictures ago; 0 is any.
    """

    fonts: Fonts
    words: Words
    size: int
    frames: int
    ago: int
