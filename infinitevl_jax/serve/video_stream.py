"""A video that is watched as it comes, in constant memory, and asked about at any time.

    stream = engine.open_stream(processor)
    stream.push(frame, seconds)
    print("".join(stream.ask("What is happening?")))

To the model the stream is one long video in one user turn: frames follow the template's text up to
the video, and stand at the rotary positions that their timestamps give. A question is answered from
a copy of the stream's cache, behind the frames that were pushed before it. The stream itself does
not change.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.arrays import number, whole_number
from infinitevl_jax.inputs.frame import frame_inputs
from infinitevl_jax.inputs.model_inputs import ModelInputs, build_inputs
from infinitevl_jax.inputs.positions import MAX_POSITION
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.processing import Processor
from infinitevl_jax.processing.images import (
    MAX_RESIZED_PIXELS,
    load_image,
    resize_image,
    smart_resize,
)
from infinitevl_jax.rational import exact
from infinitevl_jax.serve.conversation import end_tokens
from infinitevl_jax.serve.stream_file import Memory, load_stream, save_stream
from infinitevl_jax.serve.stream_layout import stream_layout

if TYPE_CHECKING:
    from infinitevl_jax.serve.engine import Engine
    from infinitevl_jax.serve.requests import Request


class VideoStream:
    """One video in a slot of an engine. One thread at a time calls it.

    Attributes:
      frames: read or waiting to be read. dropped: frames that came too fast and were left out.
      seconds: timestamp of the newest frame, None before the first.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        *,
        layout: str = "video",
        system: str | None = None,
        waiting: int = 16,
        cache: Cache | None = None,
    ):
        """
        Args:
          layout: a name in `infinitevl_jax.serve.stream_layout`: "video", or "reference" for the
            format of the authors' program.
          system: a system message; None: what the chat template writes.
          waiting: frames that may wait to be read. One more, and the oldest of them is dropped.
          cache: of a stream that this one goes on from (`load`).

        Raises InfiniteVLError where the engine has no free slot, or the model no vision tower.
        """
        self._layout = stream_layout(layout, engine.model.config, processor, system)
        self.engine, self.processor = engine, processor
        self.layout, self.system = layout, system
        self.waiting = whole_number(waiting, "waiting", 1)
        self.frames = self.dropped = 0
        self.seconds: float | None = None
        self._first: float | None = None
        self._queue: collections.deque[ModelInputs] = collections.deque()
        self._fed = False  # whether the sequence asks for waiting frames
        self._sequence = engine.open(cache)
        if cache is None:
            self._sequence.extend(self._text(self._layout.opening, 0))
            self._tokens = len(self._layout.opening)
        else:
            self._tokens = int(np.asarray(cache.length)[0])

    def push(self, frame: Any, seconds: float, *, wait: bool = True) -> None:
        """Show a frame.

        Args:
          frame: a picture as the processor takes it: PIL, an array [height, width, 3] uint8, a
            path, bytes of a file. Any size; it is resized as a frame of a video is.
          seconds: its time, not before the frame's before it.
          wait: read it before returning. Otherwise it is read when the engine works next, together
            with other streams' frames; where `waiting` frames wait already, the oldest is dropped.

        Raises InfiniteVLError for a frame that cannot be read, a time that goes back, and where a
        model that keeps the whole past has no room left. The stream goes on as if the frame had
        not come.
        """
        if self._sequence.done:
            raise InfiniteVLError("the stream was closed", "open another, or load a saved one")
        seconds = number(seconds, "seconds", 0, 1e9, "pass the frame's time in seconds")
        if self.seconds is not None and seconds < self.seconds:
            raise InfiniteVLError(
                f"a frame at {seconds:g} s came after one at {self.seconds:g} s",
                "push frames in the order of their times",
            )
        first = seconds if self._first is None else self._first
        new = self._frame(self._pixels(frame), exact(seconds) - exact(first))
        tokens, full = _tokens(new), len(self._queue) == self.waiting
        self._check_room(tokens - (_tokens(self._queue[0]) if full else 0))
        if full:
            self._tokens -= _tokens(self._queue.popleft())
            self.frames, self.dropped = self.frames - 1, self.dropped + 1
        self._queue.append(new)
        self.seconds, self._first = seconds, first
        self.frames, self._tokens = self.frames + 1, self._tokens + tokens
        if not self._fed:
            self._fed = True
            self._sequence.extend(self._waiting_frames())
        if wait:
            self._sequence.read()

    def ask(self, question: str, **arguments: Any) -> Iterator[str]:
        """Answer a question about the video so far; yields the text as it is made.

        arguments: as for `Engine.submit`.

        It needs a slot of the engine, and waits for a request to leave one. Raises InfiniteVLError
        where open streams hold all slots, and for a question that has no room. The stream goes on
        as if it had not come.
        """
        if self.seconds is None:
            raise InfiniteVLError("no frame was pushed yet", "push one before the first question")
        closing = self._layout.closing(question)
        arguments.setdefault("eos_token_ids", end_tokens(self.engine.model, self.processor))
        request = self.engine.submit(closing[None], cache=self._sequence.cache(), **arguments)
        return self._said(request, set(arguments["eos_token_ids"]))

    def _said(self, request: Request, ends: set[int]) -> Iterator[str]:
        text = self.processor.stream()
        try:
            for token in request:
                if token not in ends:
                    yield text.push(token)
            yield text.finish()
        finally:
            request.cancel()

    def close(self) -> None:
        """Give the slot back."""
        self._sequence.close()

    def save(self, path: str | Path) -> None:
        """Write what the stream remembers into a safetensors file, whole or not at all: as many
        bytes as a cache has, however long the video."""
        cache = self._sequence.cache()
        memory = Memory(
            self.layout, self.system, self.frames, self.dropped, self.seconds, self._first
        )
        save_stream(Path(path), memory, cache, self.engine.model)

    @classmethod
    def load(
        cls, path: str | Path, engine: Engine, processor: Processor, *, waiting: int = 16
    ) -> VideoStream:
        """Go on from a saved stream, bit for bit.

        Raises InfiniteVLError for a file that is cut short, no stream, or another model's.
        """
        wanted = engine.model.init_cache(1, engine.max_length)
        memory, cache = load_stream(Path(path), wanted, engine.model)
        stream = cls(
            engine,
            processor,
            layout=memory.layout,
            system=memory.system,
            waiting=waiting,
            cache=cache,
        )
        stream.frames, stream.dropped = memory.frames, memory.dropped
        stream.seconds, stream._first = memory.seconds, memory.first
        return stream

    def _waiting_frames(self) -> Iterator[tuple[ModelInputs, int]]:
        """Inputs of the waiting frames, each taken when its turn comes."""
        while self._queue:
            yield self._queue.popleft(), 0
        self._fed = False

    def _pixels(self, frame: Any) -> np.ndarray:
        """[height, width, 3] uint8 of a frame as `push` takes it, resized."""
        options = self.processor.videos
        if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.shape[2:] == (3,):
            height, width, _ = frame.shape
            limits = options.min_pixels, options.max_pixels
            small = 0 < height * width <= MAX_RESIZED_PIXELS
            if small and smart_resize(height, width, options.factor, *limits) == (height, width):
                return frame  # as large as it should be
        return resize_image(load_image(frame, "the frame"), options)

    def _frame(self, pixels: np.ndarray, since: Fraction) -> ModelInputs:
        """Inputs of a frame `since` seconds after the first."""
        options, layout = self.processor.videos, self._layout
        time = layout.time(since)
        if time > MAX_POSITION:
            raise InfiniteVLError(
                f"a frame {float(since):,.0f} s after the first comes to position {time:,}, more"
                f" than the {MAX_POSITION:,} that there are",
                "open another stream, and push times in seconds",
            )
        return frame_inputs(
            self.engine.model.config,
            pixels,
            *options.normalisation,
            token=layout.token,
            base=layout.base,
            time=time,
        )

    def _check_room(self, tokens: int) -> None:
        most, total = self.engine.max_length, self._tokens + tokens
        if most is not None and total > most:
            raise InfiniteVLError(
                f"with this frame the stream has {total:,} tokens, the engine's slots hold"
                f" {most:,}",
                "make the engine with a larger max_length, or load a model whose layers all have"
                " constant memory",
            )

    def _text(self, ids: np.ndarray, start: int) -> Iterator[tuple[ModelInputs, int]]:
        yield build_inputs(self.engine.model.config, ids[None]), start


def _tokens(inputs: ModelInputs) -> int:
    return inputs.decoder.tokens.shape[1]
