"""How a video stream is written as tokens and rotary positions. There are two ways, by name.

"video": the stream is one video in a user turn, and equals the prompt that holds all of it.
"reference": the format of the authors' streaming program, to compare with it.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from PIL import Image

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import Processor
from infinitevl_jax.rational import exact


class StreamLayout(NamedTuple):
    """Tokens before, in and behind the frames, and the frames' positions."""

    opening: np.ndarray  # [tokens] ids before the first frame, at positions 0, 1, ...
    token: int  # stands for each token of a frame
    base: int  # position of the first row, of the first column, and of time 0
    ticks: Fraction  # a second; frames of one tick share their temporal position
    stride: int  # temporal positions from one tick to the next
    closing: Callable[[str], np.ndarray]  # question -> ids from the newest frame to the answer

    def time(self, since: Fraction) -> int:
        """Temporal position of a frame `since` seconds after the first."""
        return self.base + math.floor(since * self.ticks) * self.stride


def stream_layout(
    name: str, config: ModelConfig, processor: Processor, system: str | None
) -> StreamLayout:
    """The layout of this name.

    system: a system message; None: what the chat template writes.
    """
    if config.vision is None:
        raise InfiniteVLError("a text model reads no video", "load a model with a vision tower")
    if name not in _LAYOUTS:
        raise InfiniteVLError(f"layout is {name!r}", f"choose one of {', '.join(_LAYOUTS)}")
    rate = exact(config.vision.tokens_per_second)
    return _LAYOUTS[name](config, rate, processor, system)


def _video(
    config: ModelConfig, rate: Fraction, processor: Processor, system: str | None
) -> StreamLayout:
    blank = Image.new("RGB", (processor.videos.factor, processor.videos.factor))
    frames = {"type": "video", "video": [blank] * processor.videos.temporal_patch_size}

    def around(question: str) -> tuple[np.ndarray, np.ndarray]:
        ids = _turn(processor, system, [frames, {"type": "text", "text": question}])
        (places,) = np.nonzero(ids == config.video_token_id)
        return ids[: places[0]], ids[places[-1] + 1 :]

    opening, _ = around("")
    return StreamLayout(
        opening,
        config.video_token_id,
        len(opening),
        rate,
        1,
        lambda question: around(question)[1],
    )


def _reference(
    config: ModelConfig, rate: Fraction, processor: Processor, system: str | None
) -> StreamLayout:
    """`<|vision_start|>`, then frames without separators; a question is `<|vision_end|>` and a
    conversation of its own. Positions count the opening token twice, and time in whole seconds,
    two positions each; `rate` plays no part."""

    def closing(question: str) -> np.ndarray:
        ids = _turn(processor, system, question)
        return np.concatenate([[config.vision_end_token_id], ids]).astype(ids.dtype)

    opening = np.array([config.vision_start_token_id])
    return StreamLayout(opening, config.image_token_id, 2, Fraction(1), 2, closing)


def _turn(processor: Processor, system: str | None, content: str | list[dict]) -> np.ndarray:
    """Ids of a conversation that begins with this question."""
    opening = [] if system is None else [{"role": "system", "content": system}]
    return processor([*opening, {"role": "user", "content": content}])["input_ids"][0]


_LAYOUTS = {"video": _video, "reference": _reference}
