"""Videos: from a file, bytes or frames to evenly spaced, resized frames with their true rate.

Frames are chosen by their presentation time stamps, so files of variable frame rate keep true time.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import av
import numpy as np
from PIL import Image

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing.images import ImageOptions, check_array, describe, load_image, open_bytes, smart_resize

DAMAGED = "play it in a viewer; copy it again, or re-encode it: ffmpeg -i IN -c:v libx264 OUT.mp4"


@dataclass(frozen=True)
class VideoOptions(ImageOptions):
    """How a video becomes patches. `min_pixels` and `max_pixels` are per frame.

    `total_pixels`, where given, bounds the whole video: each pair of frames (`temporal_patch_size`) gets an even share of it, though never
    less than 1.05 x min_pixels. `num_frames` asks for a count instead of a rate.
    """

    min_pixels: int = 100_352
    max_pixels: int = 602_112
    total_pixels: int | None = None
    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    num_frames: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.fps, Real) and math.isfinite(self.fps) and self.fps > 0):
            raise InfiniteVLError(f"fps is {self.fps!r}", "give the frames to sample a second, a positive number")
        for name in ("total_pixels", "num_frames", "min_frames", "max_frames"):
            value = getattr(self, name)
            if value is None and name in ("total_pixels", "num_frames"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise InfiniteVLError(f"{name} is {value!r}", "give an integer of 1 or more")
        if self.min_frames > self.max_frames:
            raise InfiniteVLError(f"min_frames {self.min_frames} is above max_frames {self.max_frames}", "set both")

    def frame_size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """(height, width) that each of `frames` frames is resized to."""
        most = self.max_pixels
        if self.total_pixels is not None:
            share = self.total_pixels / frames * self.temporal_patch_size
            most = int(max(min(most, share), self.min_pixels * 1.05))
        return smart_resize(height, width, self.factor, self.min_pixels, most)


@dataclass(frozen=True)
class Video:
    """Chosen frames [F, H, W, 3] uint8, already resized; `fps` is their true rate, frames / seconds; `times` [F] seconds from the start."""

    frames: np.ndarray
    fps: float
    times: np.ndarray


def sample_count(duration: float, total: int, options: VideoOptions) -> int:
    """How many of `total` frames to take from `duration` seconds: an even number within the limits, or all if there are no more."""
    if options.num_frames is not None:
        count = max(options.num_frames // 2 * 2, 2)
    else:
        # Time stamps are rounded, to milliseconds in some files: the sliver keeps 19.998 frames from becoming 18.
        count = math.floor(min(max(duration * options.fps, options.min_frames), options.max_frames) + 0.01)
        count = max(count // 2 * 2, 2)
    return min(count, total)


def load_video(
    source: str | Path | bytes | Sequence | np.ndarray,
    options: VideoOptions,
    size: tuple[int, int] | None = None,
    name: str | None = None,
) -> Video:
    """Sample and resize a video.

    A file (path, file:// or data: URI, bytes) is sampled at `options.fps`, or as many frames as the limits allow; a list of images or an
    array [F, H, W, 3] uint8 counts as sampled already, at `options.fps`, and is taken whole. `size` (height, width) stands for the frames'
    own sides before rounding and limits. Raises InfiniteVLError for files that cannot be decoded to the end.
    """
    name = name or f"video {describe(source)}"

    def resize(image: Image.Image, frames: int) -> np.ndarray:
        height, width = options.frame_size(*(size or (image.height, image.width)), frames)
        return np.asarray(image.resize((width, height), options.resample))

    if isinstance(source, str | Path | bytes | bytearray | memoryview):
        return _decode(open_bytes(source, name, "video"), options, resize, name)
    if isinstance(source, list | tuple):
        if not source:
            raise InfiniteVLError(f"{name} is empty", "give at least one frame")
        images: list[Image.Image] = []
        for number, frame in enumerate(source):
            images.append(load_image(frame, f"{name}, frame {number} ({describe(frame)})"))
            if images[-1].size != images[0].size:
                sizes = [f"{image.width} x {image.height}" for image in (images[-1], images[0])]
                raise InfiniteVLError(
                    f"{name}: frame {number} is {sizes[0]}, frame 0 is {sizes[1]} (width x height)",
                    "resize or crop all frames of one video to one size",
                )
    elif hasattr(source, "shape") and hasattr(source, "dtype"):
        images = [Image.fromarray(frame) for frame in check_array(source, name, "F, H, W, 3")]
    else:
        raise InfiniteVLError(f"{name} cannot be a video", "pass a path, bytes, a list of images or a uint8 array [F, H, W, 3]")
    frames = np.stack([resize(image, len(images)) for image in images])
    return Video(frames, float(options.fps), np.arange(len(images)) / options.fps)


def _decode(file: bytes | Path, options: VideoOptions, resize: Callable[[Image.Image, int], np.ndarray], name: str) -> Video:
    try:
        start, duration, total = _time_line(file, name)
        count = sample_count(duration, total, options)
        targets = start + np.arange(count) * (duration / count) if count < total else None
        frames, times = _pick(_frames(file), targets, lambda frame: resize(_upright(frame), count), name)
    except InfiniteVLError:
        raise
    except (av.error.FFmpegError, EOFError, ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InfiniteVLError(f"{name} cannot be decoded: {reason}", DAMAGED) from error
    return Video(np.stack(frames), len(frames) / duration, np.asarray(times) - start)


def _open(file: bytes | Path) -> av.container.InputContainer:
    return av.open(io.BytesIO(file) if isinstance(file, bytes) else str(file))


def _stamp(item: av.Packet | av.VideoFrame, stream: av.VideoStream, order: int) -> float:
    """Presentation time in seconds; formats without one give decoding time, raw streams the position over the nominal rate."""
    stamp = item.pts if item.pts is not None else item.dts
    return float(stamp * stream.time_base) if stamp is not None else order / float(stream.average_rate or stream.guessed_rate or 25)


def _time_line(file: bytes | Path, name: str) -> tuple[float, float, int]:
    """First time stamp [s], duration [s] and number of frames, read from the packets without decoding."""
    with _open(file) as container:
        if not container.streams.video:
            raise InfiniteVLError(f"{name} has no video stream", "pass a file with pictures in it (is this an audio file, or cut short?)")
        stream = container.streams.video[0]
        times, last_length, heard = [], 0.0, 0.0
        for packet in container.demux():
            if not packet.size or packet.is_discard:
                continue
            if packet.stream is not stream:
                if packet.pts is not None and packet.time_base:
                    heard = max(heard, float(packet.pts * packet.time_base))
                continue
            if packet.is_corrupt:
                raise InfiniteVLError(f"{name} is damaged or cut short after {len(times)} of {stream.frames or 'its'} frames", DAMAGED)
            times.append(_stamp(packet, stream, len(times)))
            if times[-1] >= max(times[-16:]):
                last_length = float((packet.duration or 0) * stream.time_base)
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        # Other formats flag the packet that a cut falls into; Matroska just ends early.
        told = (container.duration or 0) / av.time_base if "matroska" in container.format.name else 0.0
    if not times:
        raise InfiniteVLError(f"{name} holds no frames", DAMAGED)
    start, end = min(times), max(times)
    if max(end, heard) < 0.9 * told - 1:
        raise InfiniteVLError(f"{name} is cut short after {max(end, heard):.1f} of {told:.1f} s", DAMAGED)
    mean_gap = (end - start) / (len(times) - 1) if end > start else 1 / rate
    return start, end - start + (last_length or mean_gap), len(times)


def _frames(file: bytes | Path) -> Iterator[tuple[float, av.VideoFrame]]:
    with _open(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for order, frame in enumerate(container.decode(stream)):
            yield _stamp(frame, stream, order), frame


def _upright(frame: av.VideoFrame) -> Image.Image:
    """RGB picture, turned as the file's display matrix says (phones film on their side)."""
    image = frame.to_image()
    turns = round(frame.rotation / 90) % 4
    return (
        image.transpose((Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)[turns - 1]) if turns else image
    )


def _pick(
    frames: Iterator[tuple[float, av.VideoFrame]], targets: np.ndarray | None, convert: Callable[[av.VideoFrame], np.ndarray], name: str
) -> tuple[list[np.ndarray], list[float]]:
    """For each target time the frame nearest to it (a tie takes the earlier); all frames where `targets` is None.

    One walk over the decoder's output, holding two frames at a time: a film is never in memory whole.
    """
    pictures: list[np.ndarray] = []
    times: list[float] = []
    converted: tuple[av.VideoFrame, np.ndarray] | None = None

    def keep(time: float, frame: av.VideoFrame) -> None:
        nonlocal converted
        if converted is None or converted[0] is not frame:
            converted = frame, convert(frame)
        times.append(time)
        pictures.append(converted[1])

    previous: tuple[float, av.VideoFrame] | None = None
    for time, frame in frames:
        if targets is None:
            keep(time, frame)
        else:
            while len(times) < len(targets) and time >= targets[len(times)]:
                target = targets[len(times)]
                keep(*(previous if previous is not None and target - previous[0] <= time - target else (time, frame)))
        previous = time, frame
    if previous is None:
        raise InfiniteVLError(f"{name} holds no decodable frames", DAMAGED)
    while targets is not None and len(times) < len(targets):
        keep(*previous)
    return pictures, times
