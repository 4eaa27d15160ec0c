"""A video that is watched as it comes, in constant memory, and asked about at any time.

    stream = VideoStream(engine, processor)
    stream.push(frame, seconds)
    print("".join(stream.ask("What is happening?")))

To the model the stream is one long video in one user turn: frames follow the template's text up to
the video, and stand at the rotary positions that their timestamps give. A question is answered from
a copy of the stream's cache, behind the frames that were pushed before it. The stream itself does
not change.
"""

import collections
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from infinitevl_jax.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.arrays import number, whole_number
from infinitevl_jax.inputs.model_inputs import ModelInputs, build_inputs
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.processing import Processor
from infinitevl_jax.processing.images import load_image, process_image
from infinitevl_jax.serve.conversation import end_tokens
from infinitevl_jax.serve.engine import Engine
from infinitevl_jax.writing import storage, sync

FORMAT = 1  # of a saved stream


class VideoStream:
    """One video in a slot of an engine.

    Attributes:
      frames: read or waiting to be read. dropped: frames that came too fast and were left out.
      seconds: timestamp of the newest frame, None before the first.
    """

    def __init__(
        self,
        engine: Engine,
        processor: Processor,
        *,
        waiting: int = 16,
        cache: Cache | None = None,
    ):
        """
        Args:
          waiting: frames that may wait to be read. One more, and the oldest of them is dropped.
          cache: of a stream that this one goes on from (`load`).

        Raises InfiniteVLError where the engine has no free slot, or the model no vision tower.
        """
        config = engine.model.config
        if config.vision is None:
            raise InfiniteVLError("a text model reads no video", "load a model with a vision tower")
        self.engine, self.processor, self._vision = engine, processor, config.vision
        self.waiting = whole_number(waiting, "waiting", 1)
        self.frames = self.dropped = 0
        self.seconds: float | None = None
        self._first: float | None = None
        self._queue: collections.deque[tuple[np.ndarray, tuple[int, int, int], float]] = (
            collections.deque()
        )
        self._opening, _ = self._around("")
        self._sequence = engine.open(cache)
        if cache is None:
            self._sequence.extend(self._text(self._opening, 0))

    def push(self, frame: Any, seconds: float, *, wait: bool = True) -> None:
        """Show a frame.

        Args:
          frame: a picture as the processor takes it: PIL, an array [height, width, 3] uint8, a
            path. Any size; it is resized as the checkpoint's images are.
          seconds: its time, not before the frame's before it.
          wait: read it before returning. Otherwise it is read when the engine works next, together
            with other streams' frames; where `waiting` frames wait already, the oldest is dropped.

        Raises InfiniteVLError for a frame that cannot be read, or a time that goes back. The stream
        goes on as if it had not come.
        """
        if self._sequence.done:
            raise InfiniteVLError("the stream was closed", "open another, or load a saved one")
        seconds = number(seconds, "seconds", 0, 1e9, "pass the frame's time in seconds")
        if self.seconds is not None and seconds < self.seconds:
            raise InfiniteVLError(
                f"a frame at {seconds:g} s came after one at {self.seconds:g} s",
                "push frames in the order of their times",
            )
        patches, grid = process_image(load_image(frame, "the frame"), self.processor.images)
        self._position(seconds)
        self.seconds = seconds
        self._first = seconds if self._first is None else self._first
        if len(self._queue) == self.waiting:
            self._queue.popleft()
            self.frames, self.dropped = self.frames - 1, self.dropped + 1
        self._queue.append((patches, grid, seconds))
        self.frames += 1
        if not self._sequence.reading:
            self._sequence.extend(self._frames())
        if wait:
            self._sequence.read()

    def ask(self, question: str, **arguments: Any) -> Iterator[str]:
        """Answer a question about the video so far; yields the text as it is made.

        arguments: as for `Engine.submit`.
        """
        if self.seconds is None:
            raise InfiniteVLError("no frame was pushed yet", "push one before the first question")
        _, closing = self._around(question)
        arguments.setdefault("eos_token_ids", end_tokens(self.engine.model, self.processor))
        request = self.engine.submit(closing[None], cache=self._sequence.cache(), **arguments)
        return self._said(request, set(arguments["eos_token_ids"]))

    def _said(self, request, ends: set[int]) -> Iterator[str]:
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
        path = Path(path)
        cache = jax.tree.map(np.asarray, self._sequence.cache())
        leaves = _named(cache)
        facts = {
            "format": FORMAT,
            "model": _fingerprint(self.engine),
            "frames": self.frames,
            "dropped": self.dropped,
            "seconds": self.seconds,
            "first": self._first,
        }
        aside = path.with_name(f".{path.name}.partial")
        with storage(path):
            aside.unlink(missing_ok=True)
            try:
                entries = [(name, leaf.dtype, leaf.shape) for name, leaf in leaves.items()]
                writer = SafetensorsWriter(aside, entries, {"stream": json.dumps(facts)})
                try:
                    for name, leaf in leaves.items():
                        writer.put(name, leaf)
                    writer.close()
                except BaseException:
                    writer.abort()
                    raise
                sync(aside)
                os.replace(aside, path)
            finally:
                aside.unlink(missing_ok=True)
            sync(path.parent)

    @classmethod
    def load(
        cls, path: str | Path, engine: Engine, processor: Processor, *, waiting: int = 16
    ) -> "VideoStream":
        """Go on from a saved stream, bit for bit.

        Raises InfiniteVLError for a file that is cut short, no stream, or another model's.
        """
        file = SafetensorsFile(path)
        try:
            facts = json.loads(file.metadata["stream"])
            frames, dropped = int(facts["frames"]), int(facts["dropped"])
            times = [None if facts[name] is None else float(facts[name]) for name in _TIMES]
            known = facts["format"], facts["model"]
        except (KeyError, TypeError, ValueError):
            raise InfiniteVLError(f"{path} is no saved stream", "save one with save") from None
        wanted = engine.model.init_cache(1, engine.max_length)
        names = _named(wanted)
        found = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        same = found == {name: (np.dtype(leaf.dtype), leaf.shape) for name, leaf in names.items()}
        if known != (FORMAT, _fingerprint(engine)) or not same:
            raise InfiniteVLError(
                f"{path} is a stream of another model, dtype or format",
                "load it with the model that it was saved with",
            )
        leaves = [np.array(file.array(name)) for name in names]
        cache = jax.tree.unflatten(jax.tree.structure(wanted), leaves)
        stream = cls(engine, processor, waiting=waiting, cache=cache)
        stream.frames, stream.dropped = frames, dropped
        stream.seconds, stream._first = times
        return stream

    def _frames(self) -> Iterator[tuple[ModelInputs, int]]:
        """Inputs of the waiting frames, each taken when its turn comes."""
        while self._queue:
            patches, grid, seconds = self._queue.popleft()
            yield self._frame(patches, grid, seconds), 0

    def _frame(
        self, patches: np.ndarray, grid: tuple[int, int, int], seconds: float
    ) -> ModelInputs:
        config, base = self.engine.model.config, len(self._opening)
        count = len(patches) // self._vision.merge_unit
        inputs = build_inputs(
            config,
            np.full((1, count), config.video_token_id),
            pixel_values_videos=patches,
            video_grid_thw=np.array([grid]),
            second_per_grid_ts=np.ones(1),
            start=[base],
        )
        # rows and columns are counted from the start of the video, time as the video's clock goes
        positions = np.array(inputs.decoder.positions)
        positions[0] = self._position(seconds)
        decoder = inputs.decoder._replace(positions=positions)
        return inputs._replace(decoder=decoder)

    def _position(self, seconds: float) -> int:
        """Temporal rotary position of a frame."""
        rate = self._vision.tokens_per_second
        first = seconds if self._first is None else self._first
        return len(self._opening) + math.floor((seconds - first) * rate)

    def _text(self, ids: np.ndarray, start: int) -> Iterator[tuple[ModelInputs, int]]:
        yield build_inputs(self.engine.model.config, ids[None]), start

    def _around(self, question: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a question's turn before and after the video."""
        side = self.processor.videos.factor
        blank = Image.new("RGB", (side, side))
        content = [
            {"type": "video", "video": [blank] * self.processor.videos.temporal_patch_size},
            {"type": "text", "text": question},
        ]
        ids = self.processor([{"role": "user", "content": content}])["input_ids"][0]
        (places,) = np.nonzero(ids == self.engine.model.config.video_token_id)
        return ids[: places[0]], ids[places[-1] + 1 :]


_TIMES = ("seconds", "first")


def _named(cache: Cache) -> dict[str, Any]:
    """The cache's arrays by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(cache)
    }


def _fingerprint(engine: Engine) -> str:
    """What a cache depends on, beside the weights."""
    return repr((engine.model.config, engine.model.dtype.name, engine.max_length))
