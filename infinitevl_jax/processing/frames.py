"""Frames with their times, one after another: of a film, of standard input, of a camera.

Nothing is held but the frame at hand. Times are exact seconds from the first frame.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
from av.error import FFmpegError
from PIL import Image

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing.images import load_image
from infinitevl_jax.processing.sources import describe, open_source
from infinitevl_jax.processing.video import damage_named
from infinitevl_jax.processing.video_file import MAX_FRAME_PIXELS, decode, read_track, upright
from infinitevl_jax.rational import exact

Frames = Iterator[tuple[Fraction, Image.Image]]

_PIECE = 1 << 16  # bytes read at once
_MAX_JPEG = 1 << 26  # bytes of one frame


def film_frames(path: str | Path, fps: float) -> tuple[int, Frames]:
    """Frames of a local film: in each step of 1 / fps seconds the first that is shown in it.

    Returns: their number, known from the file's index, and the frames.

    Raises InfiniteVLError for a file that is no complete film; the frames do so too, where one
    cannot be decoded.
    """
    name = f"video {describe(path)}"
    with open_source(path, name, "video") as file, damage_named(name):
        track = read_track(file, name)
    count = sum(1 for _ in paced(((time, None) for time in track.times), fps))

    def frames() -> Frames:
        with open_source(path, name, "video") as file, damage_named(name):
            for seconds, frame in paced(decode(file, track, name), fps):
                yield seconds, upright(frame)

    return count, frames()


def paced(frames: Iterator[tuple[Fraction, object]], fps: float) -> Iterator:
    """The first frame in each step of 1 / fps seconds; none where a step has none."""
    rate, due = exact(fps), Fraction(0)
    for seconds, frame in frames:
        if seconds >= due:
            yield seconds, frame
            due = (seconds * rate // 1 + 1) / rate


def raw_frames(file: BinaryIO, size: tuple[int, int]) -> Iterator[Image.Image]:
    """Frames of raw rgb24 video. size: (width, height) in pixels."""
    width, height = size
    if not 0 < width * height <= MAX_FRAME_PIXELS:
        raise InfiniteVLError(
            f"frames of {width} x {height} pixels", f"a frame has 1 to {MAX_FRAME_PIXELS:,} pixels"
        )
    number, wanted = 0, width * height * 3
    while pixels := _exactly(file, wanted):
        if len(pixels) < wanted:
            raise InfiniteVLError(
                f"standard input ends inside frame {number}: {len(pixels):,} of {wanted:,} bytes",
                "send whole frames of rgb24, and check the size",
            )
        yield Image.frombytes("RGB", size, pixels)
        number += 1


def jpeg_frames(file: BinaryIO) -> Iterator[Image.Image]:
    """Frames of motion JPEG: JPEG files one after another, of any sizes."""
    parser, number, pending = av.CodecContext.create("mjpeg", "r"), 0, 0
    while piece := _some(file):
        if not number and not pending and piece[:1] != b"\xff":
            raise InfiniteVLError(
                "standard input is no motion JPEG",
                "send JPEG files one after another (ffmpeg -i IN -f mjpeg -), or rgb24 with --size",
            )
        pending += len(piece)
        for packet in parser.parse(piece):
            yield load_image(bytes(packet), f"frame {number} of standard input")
            number, pending = number + 1, 0
        if pending > _MAX_JPEG:
            raise InfiniteVLError(
                f"frame {number} of standard input has more than {_MAX_JPEG:,} bytes",
                "send motion JPEG: JPEG files one after another",
            )
    for packet in parser.parse(None):
        yield load_image(bytes(packet), f"frame {number} of standard input")
        number += 1


def is_device(path: str | Path) -> bool:
    """Whether a path names a device, such as a camera."""
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def camera_frames(path: str | Path) -> Iterator[Image.Image]:
    """Frames of a camera (Video4Linux), as they come."""
    cure = "check that it is a camera, that no other program uses it, and that you may read it"
    try:
        with av.open(str(Path(path).absolute()), format="v4l2") as container:
            for frame in container.decode(video=0):
                yield upright(frame)
    except ValueError as error:  # FFmpeg without this format
        raise InfiniteVLError(
            f"camera {path}: {error}", "install an av with v4l2, or send frames to standard input"
        ) from None
    except (FFmpegError, OSError, IndexError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InfiniteVLError(f"camera {path}: {reason}", cure) from None


def at_rate(images: Iterator[Image.Image], fps: float) -> Frames:
    """Frames that were sampled at `fps` a second."""
    rate = exact(fps)
    return ((number / rate, image) for number, image in enumerate(images))


def by_clock(
    images: Iterator[Image.Image], fps: float, now: Callable[[], float] = time.monotonic
) -> Frames:
    """Frames at the times at which they come, at most `fps` a second."""

    def timed() -> Frames:
        first = None
        for image in images:
            seconds = now()
            first = seconds if first is None else first
            yield Fraction(round((seconds - first) * 1000), 1000), image

    return paced(timed(), fps)


def _exactly(file: BinaryIO, count: int) -> bytes:
    """`count` bytes, fewer at the end."""
    parts, missing = [], count
    while missing and (piece := _read(file, missing)):
        parts.append(piece)
        missing -= len(piece)
    return b"".join(parts)


def _some(file: BinaryIO) -> bytes:
    return _read(file, _PIECE)


def _read(file: BinaryIO, most: int) -> bytes:
    try:
        return file.read(most) or b""
    except OSError as error:
        raise InfiniteVLError(
            f"standard input cannot be read: {error.strerror}", "send frames through a pipe"
        ) from None
