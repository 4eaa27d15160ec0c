"""`infinitevl stream`: a video watched as it comes, and the questions about it."""

import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import typer
from PIL import Image
from tqdm import tqdm

from infinitevl_jax import compilation
from infinitevl_jax.cli.session import Place, Settings, read_model, remarks, say
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.interrupts import postponed
from infinitevl_jax.processing import Processor
from infinitevl_jax.processing.ahead import Ahead
from infinitevl_jax.processing.frames import (
    at_rate,
    by_clock,
    camera_frames,
    film_frames,
    is_device,
    jpeg_frames,
    raw_frames,
)
from infinitevl_jax.processing.images import smart_resize
from infinitevl_jax.serve.engine import Engine
from infinitevl_jax.serve.infinitevl import InfiniteVL
from infinitevl_jax.serve.video_stream import VideoStream

LONGEST_CHUNK = 512  # tokens
_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated"}
_ASKED = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*:\s*(.*)", re.DOTALL)


@dataclass(frozen=True)
class Watch:
    """The command's own options."""

    video: str
    ask: Sequence[str]
    fps: float | None
    max_pixels: int | None
    size: str
    live: bool
    waiting: int
    load: Path | None
    save: Path | None
    context: int
    layout: str | None


class Question(NamedTuple):
    """`seconds` of the video at which it is asked; infinity: at its end."""

    seconds: float
    text: str


def questions(texts: Sequence[str]) -> list[Question]:
    """Questions from "SECONDS: question" and "question", in the order of their times."""
    found = []
    for text in texts:
        timed = _ASKED.fullmatch(text)
        question = Question(float(timed[1]), timed[2]) if timed else Question(float("inf"), text)
        if not question.text.strip():
            raise InfiniteVLError(
                f"--ask {text!r} has no question", 'write such as --ask "12.5: what is happening?"'
            )
        found.append(question)
    return sorted(found, key=lambda question: question.seconds)


def stream(folder: Path, watch: Watch, settings: Settings, place: Place) -> int:
    """Watch a video to its end. Returns the signal that stopped it, 0 for none."""
    asked = questions(watch.ask)
    _check(watch, settings)
    opened = []

    def check(processor: Processor, sees: bool) -> None:
        if not sees:
            raise InfiniteVLError(f"{folder} is a text model", "it cannot look at a video")
        opened.append(_open(watch, processor.videos.fps))

    signals: list[str] = []
    with remarks(), compilation.kept(place.compilation_cache):
        model, processor = read_model(folder, place, check)
        ((fps, count, frames),) = opened
        if watch.max_pixels is not None:
            options = processor.videos
            low = min(options.min_pixels, watch.max_pixels)
            processor.videos = replace(options, min_pixels=low, max_pixels=watch.max_pixels)
        with contextlib.ExitStack() as stack:
            for name in _WORDS:
                stack.enter_context(postponed(partial(signals.append, name), name))
            live = watch.live or is_device(watch.video)
            ahead = Ahead(frames, watch.waiting, live=live, stopped=lambda: bool(signals))
            stack.callback(ahead.close)
            _Viewer(model, processor, watch, settings, signals).see(ahead, asked, fps, count)
    if not signals:
        return 0
    typer.echo(_WORDS[signals[0]], err=True)
    return int(getattr(signal, signals[0]))


def _check(watch: Watch, settings: Settings) -> None:
    """Raise InfiniteVLError for options that do not fit each other, before anything slow."""
    if watch.video != "-" and (watch.size or watch.live):
        raise InfiniteVLError(
            f"--{'size' if watch.size else 'live'} came with VIDEO {watch.video!r}",
            "it is for frames from standard input: VIDEO is -",
        )
    if watch.load is not None and (watch.layout or settings.system):
        raise InfiniteVLError(
            f"--{'layout' if watch.layout else 'system'} came with --load",
            "leave it out: the saved stream goes on as it began",
        )
    for name, path in (("--save", watch.save), ("--load", watch.load)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            wrong = "a folder" if path.is_dir() else f"in {path.parent}, which is no folder"
            raise InfiniteVLError(f"{name}: {path} is {wrong}", "name a file in a folder")


def _open(
    watch: Watch, usual: float
) -> tuple[float, int | None, Iterator[tuple[Fraction, Image.Image]]]:
    """Frames a second, their number where it is known, and the frames.

    usual: frames a second by the checkpoint.
    """
    fps = usual if watch.fps is None else watch.fps
    if not 1e-6 <= fps <= 1e4:
        raise InfiniteVLError(f"--fps is {fps:g}", "give a number from 0.000001 to 10,000")
    if watch.video != "-":
        if is_device(watch.video):
            return fps, None, by_clock(camera_frames(watch.video), fps)
        return fps, *film_frames(watch.video, fps)
    # without its buffer, which a thread must not hold when the process ends
    file = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    images = raw_frames(file, _size(watch.size)) if watch.size else jpeg_frames(file)
    return fps, None, by_clock(images, fps) if watch.live else at_rate(images, fps)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    if not found:
        raise InfiniteVLError(f"--size is {text!r}", "write width x height, such as 640x480")
    return int(found[1]), int(found[2])


class _Viewer:
    """A stream, its questions and its progress."""

    def __init__(
        self,
        model: InfiniteVL,
        processor: Processor,
        watch: Watch,
        settings: Settings,
        signals: list[str],
    ):
        self.model, self.processor, self.watch = model, processor, watch
        self.settings, self.signals = settings, signals

    def see(
        self,
        frames: Ahead[tuple[Fraction, Image.Image]],
        asked: list[Question],
        fps: float,
        count: int | None,
    ) -> None:
        """Push all frames and answer each question after the frames up to its time."""
        coming = iter(frames)
        first = next(coming, None)
        if first is None:
            if self.signals:
                return
            raise InfiniteVLError(f"{self.watch.video} holds no frames", "check what sends them")
        stream, since = self._stream(first[1]), time.perf_counter()
        # a film that follows a saved stream begins one step after its newest frame
        begin = 0.0 if stream.seconds is None else stream.seconds + 1 / fps
        seen, at, asked = 0, 0.0, list(asked)
        bar = tqdm(total=count, unit=" frames", file=sys.stderr, disable=None, leave=False)
        with bar, contextlib.closing(stream):
            try:
                for seconds, image in chain([first], coming):
                    while asked and asked[0].seconds < seconds:
                        self._answer(stream, asked.pop(0), at, bar)
                    if self.signals:
                        break
                    stream.push(image, begin + float(seconds))
                    seen, at = seen + 1, float(seconds)
                    bar.set_postfix_str(self._state(frames.dropped), refresh=False)
                    bar.update()
                while asked and not self.signals:
                    self._answer(stream, asked.pop(0), at, bar)
            finally:
                bar.close()
                rate = seen / (time.perf_counter() - since)
                more = self._state(frames.dropped)
                say(f"{seen:,} frames up to {at:g} s, {rate:.1f} a second{more and ', ' + more}")
                stream.dropped += frames.dropped
                if self.watch.save is not None and stream.seconds is not None:
                    stream.save(self.watch.save)
                    say(f"the memory is in {self.watch.save}")

    def _stream(self, image: Image.Image) -> VideoStream:
        """The stream, in an engine whose chunks fit the first frame."""
        options, watch = self.processor.videos, self.watch
        limits = options.factor, options.min_pixels, options.max_pixels
        height, width = smart_resize(image.height, image.width, *limits)
        tokens = height * width // options.factor**2
        pieces = -(-tokens // LONGEST_CHUNK)
        chunk = -(-tokens // pieces // 64) * 64
        engine = Engine(self.model, slots=2, max_length=watch.context, chunk=chunk)
        say(f"frames of {width} x {height} pixels, {tokens:,} tokens each")
        if watch.load is not None:
            stream = VideoStream.load(watch.load, engine, self.processor)
            say(f"goes on from {watch.load}: {stream.frames:,} frames")
            return stream
        system = self.settings.system or None
        return engine.open_stream(self.processor, layout=watch.layout or "video", system=system)

    def _answer(self, stream: VideoStream, question: Question, at: float, bar: tqdm) -> None:
        """Print an answer as it is made, behind its time."""
        settings = self.settings
        bar.clear()
        say(f"{at:g} s: {question.text}")
        pieces = stream.ask(
            question.text,
            max_new_tokens=settings.max_new_tokens,
            sampling=settings.choice(self.model),
            seed=settings.seed,
        )
        typer.echo(f"{at:g} s: ", nl=False)
        with contextlib.closing(pieces):
            for piece in pieces:
                typer.echo(piece, nl=False)
                if self.signals:
                    break
        typer.echo("")
        bar.refresh()

    def _state(self, dropped: int) -> str:
        """Dropped frames and device memory, where there are such."""
        words = [f"{dropped:,} dropped"] if dropped else []
        device = next(iter(self.model.params["norm.weight"].devices()))
        stats = device.memory_stats()
        if stats and "bytes_in_use" in stats:
            words.append(f"{stats['bytes_in_use'] / 1e9:.2f} GB on the device")
        return ", ".join(words)
