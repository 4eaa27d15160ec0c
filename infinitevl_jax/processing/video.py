"""Videos: sampling of evenly spaced frames, and resizing.

Frames are selected by presentation time stamps, which is exact for variable frame rates. Times are
fractions.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TypeVar

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image

from infinitevl_jax.errors import InfiniteVLError, shown
from infinitevl_jax.processing.images import (
    ImageOptions,
    check_array,
    check_counts,
    is_number,
    load_image,
    sides,
    smart_resize,
)
from infinitevl_jax.processing.sources import describe, open_source
from infinitevl_jax.processing.video_file import DAMAGED, decode, read_track, upright
from infinitevl_jax.rational import exact

MAX_PIXELS = 1 << 27  # of all resized frames of a video: 1.6 GB of patches
_ROUNDED = 0.01  # error in frames of a duration, due to rounded time stamps

Frame = TypeVar("Frame")


@dataclass(frozen=True)
class VideoOptions(ImageOptions):
    """Video settings.

    Attributes:
      min_pixels, max_pixels: per frame.
      total_pixels: limit for the whole video, shared evenly by groups of `temporal_patch_size`
        frames, but at least 1.05 x min_pixels each. The default is Qwen2.5-VL's 24,576 tokens; None
        is no limit.
      fps: frames to sample per second.
      num_frames: number of frames to sample, instead of a rate.
    """

    min_pixels: int = 100_352
    max_pixels: int = 602_112
    total_pixels: int | None = 24_576 * 28 * 28
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    num_frames: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not is_number(self.fps) or not 1e-6 <= self.fps <= 1e4:
            raise InfiniteVLError(
                f"fps is {shown(self.fps)}",
                "give the frames to sample a second, a number from 0.000001 to 10,000",
            )
        most = {
            "total_pixels": 1 << 40,
            "num_frames": 10**6,
            "min_frames": 10**6,
            "max_frames": 10**6,
        }
        optional = ("total_pixels", "num_frames")
        check_counts(
            self,
            {
                name: most[name]
                for name in most
                if name not in optional or getattr(self, name) is not None
            },
        )
        if self.min_frames > self.max_frames:
            raise InfiniteVLError(
                f"min_frames {self.min_frames} is above max_frames {self.max_frames}", "set both"
            )

    def frame_size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """Size (height, width) that each of `frames` frames is resized to."""
        most = self.max_pixels
        if self.total_pixels is not None:
            share = self.total_pixels / frames * self.temporal_patch_size
            most = int(max(min(most, share), self.min_pixels * 1.05))
        return smart_resize(height, width, self.factor, self.min_pixels, most)


@dataclass(frozen=True)
class Video:
    """Sampled and resized frames.

    Attributes:
      frames: [F, H, W, 3] uint8.
      fps: exact sampled rate, frames / seconds.
      times: [F] seconds from the start.
    """

    frames: np.ndarray
    fps: Fraction
    times: np.ndarray


def sample_count(duration: float | Fraction, total: int, options: VideoOptions) -> int:
    """Number of frames to sample out of `total` in `duration` seconds.

    It is even and within the limits, or `total` if that is smaller.
    """
    if options.num_frames is not None:
        count = max(options.num_frames // 2 * 2, 2)
    else:
        # Rounded time stamps (milliseconds in some files) must not turn 19.998 frames into 18.
        count = math.floor(
            min(max(float(duration * exact(options.fps)), options.min_frames), options.max_frames)
            + _ROUNDED
        )
        count = max(count // 2 * 2, 2)
    return min(count, total)


def check_video(source: str | Path | bytes, name: str | None = None) -> None:
    """Raise InfiniteVLError for an incomplete video, as `load_video` does. Decodes nothing."""
    name = name or f"video {describe(source)}"
    with open_source(source, name, "video") as file, damage_named(name):
        read_track(file, name)


@contextmanager
def damage_named(name: str) -> Iterator[None]:
    """Turn FFmpeg's errors into InfiniteVLError."""
    try:
        yield
    except InfiniteVLError:
        raise
    except (FFmpegError, EOFError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InfiniteVLError(f"{name} cannot be decoded: {reason}", DAMAGED) from error


def load_video(
    source: str | Path | bytes | Sequence | np.ndarray,
    options: VideoOptions,
    size: tuple[int, int] | None = None,
    name: str | None = None,
) -> Video:
    """Sample and resize a video.

    Args:
      source: a file (path, file:// or data: URL, bytes), which is sampled at `options.fps` within
        the limits. Or a list of images or array [F, H, W, 3] uint8, which is already sampled at
        `options.fps` and used completely.
      size: (height, width) to use instead of the frames' own size, before rounding and limits.
      name: name of the video, for errors.

    Raises:
      InfiniteVLError: the video cannot be decoded completely.
    """
    name = name or f"video {describe(source)}"

    if isinstance(source, str | Path | bytes | bytearray | memoryview):
        with open_source(source, name, "video") as file, damage_named(name):
            return _sample(file, options, size, name)
    rate = exact(options.fps)
    if isinstance(source, list | tuple):
        if not source:
            raise InfiniteVLError(f"{name} is empty", "give at least one frame")
        images = _listed(source, name)
    elif hasattr(source, "shape") and hasattr(source, "dtype"):
        source = check_array(source, name, "F, H, W, 3")
        images = (Image.fromarray(frame) for frame in source)
    else:
        raise InfiniteVLError(
            f"{name} cannot be a video",
            "pass a path, bytes, a list of images or a uint8 array [F, H, W, 3]",
        )
    timed = ((k / rate, image) for k, image in enumerate(images))
    frames, times = _resized(timed, len(source), options, size, name)
    return Video(frames, rate, np.array([float(time) for time in times]))


def _listed(source: Sequence, name: str) -> Iterator[Image.Image]:
    """Load a list of images, which must all have the same size."""
    first = None
    for number, frame in enumerate(source):
        image = load_image(frame, f"{name}, frame {number} ({describe(frame)})")
        first = first or image.size
        if image.size != first:
            sizes = ["{} x {}".format(*size) for size in (image.size, first)]
            raise InfiniteVLError(
                f"{name}: frame {number} is {sizes[0]}, frame 0 is {sizes[1]} (width x height)",
                "resize or crop all frames of one video to one size",
            )
        yield image


def _sample(
    file: BinaryIO, options: VideoOptions, size: tuple[int, int] | None, name: str
) -> Video:
    """Sample evenly spaced frames of a file."""
    track = read_track(file, name)
    count, duration = sample_count(track.duration, len(track.times), options), track.duration
    if options.num_frames is None and 0 < count - duration * exact(options.fps) <= _ROUNDED:
        duration = count / exact(options.fps)  # corrects rounded time stamps
    targets = (
        track.times if count == len(track.times) else [k * duration / count for k in range(count)]
    )
    chosen = nearest(decode(file, track, name), targets)
    frames, times = _resized(chosen, count, options, size, name)
    return Video(frames, count / duration, np.array([float(time) for time in times]))


def _resized(
    chosen: Iterator[tuple[Fraction, av.VideoFrame | Image.Image]],
    count: int,
    options: VideoOptions,
    size: tuple[int, int] | None,
    name: str,
) -> tuple[np.ndarray, list[Fraction]]:
    """Resize frames one at a time. Returns `count` frames [F, H, W, 3] uint8 and their times."""
    frames, times, before = None, [], None
    for k, (time, frame) in enumerate(chosen):
        if frames is not None and frame is before:  # shown for longer than the sampling interval
            frames[k] = frames[k - 1]
        else:
            image = frame if isinstance(frame, Image.Image) else upright(frame)
            if frames is None:
                height, width = options.frame_size(*sides(size, image), count)
                span = -(-count // options.temporal_patch_size) * options.temporal_patch_size
                if span * height * width > MAX_PIXELS:
                    raise InfiniteVLError(
                        f"{name} is resized to {count:,} frames of {width:,} x {height:,} pixels,"
                        f" over the limit of {MAX_PIXELS:,} in all",
                        "lower fps, max_frames, max_pixels, min_pixels or total_pixels, or pass"
                        " fewer frames",
                    )
                frames = np.empty((count, height, width, 3), np.uint8)
            height, width = frames.shape[1:3]
            frames[k] = np.asarray(image.resize((width, height), options.resample))
        before = frame
        times.append(time)
    if frames is None:
        raise InfiniteVLError(f"{name} holds no decodable frames", DAMAGED)
    return frames, times


def nearest(
    frames: Iterator[tuple[Fraction, Frame]], targets: Sequence[Fraction]
) -> Iterator[tuple[Fraction, Frame]]:
    """The frame nearest to each of the ascending target times; the earlier one on a tie.

    Holds two frames at a time, so that the video is never in memory as a whole.
    """
    previous, waiting = None, iter(targets)
    target = next(waiting, None)
    for time, frame in frames:
        while target is not None and time >= target:
            yield (
                previous
                if previous is not None and target - previous[0] <= time - target
                else (time, frame)
            )
            target = next(waiting, None)
        previous = time, frame
    if previous is not None and target is not None:
        yield from (previous for _ in chain((target,), waiting))
