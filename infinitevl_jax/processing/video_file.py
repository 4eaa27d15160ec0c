"""Video files: selection of the video stream, frame times, decoding.

FFmpeg reads a Python file object, is limited to the formats listed here, and may open no other
file: playlists and references to files or addresses are refused.
"""

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, NoReturn

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.stream import Disposition
from PIL import Image

from infinitevl_jax.errors import InfiniteVLError, InfiniteVLWarning, quoted
from infinitevl_jax.processing.completeness import stated_size
from infinitevl_jax.processing.sources import OTHER, kind_of

MAX_FRAME_PIXELS = 8192 * 4608  # of a stored frame (8K); a decoder may hold over sixteen
MAX_SECONDS = 366 * 86_400
DAMAGED = "play it in a viewer; copy it again, or re-encode it: ffmpeg -i IN -c:v libx264 OUT.mp4"
CUT_SHORT = "copy or download it again, or keep what there is: ffmpeg -i IN -c copy OUT.mkv"

# FFmpeg's names of the supported formats. Raw streams are timed by their stated frame rate.
_RAW = ("h264", "hevc", "m4v", "mpegvideo", "obu", "vvc")
_FILMS = (
    "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "ivf",
    "mxf", "nut", "gif", "apng", "dv", "yuv4mpegpipe", *_RAW,
)  # fmt: skip
# opened only to report that there is no video
_SOUND = ("wav", "w64", "mp3", "flac", "aac", "aiff", "ac3", "amr")
# How a truncated file is told from a shorter film: by what `stated_size` reads, or by a duration,
# which live recordings may lack. All other formats state no length.
_SHOWS_ITS_END = ("mov,mp4,m4a,3gp,3g2,mj2", "gif", "apng")
_STATES_DURATION = ("matroska,webm", "flv", "asf", "avi", "ivf", "mxf")
_MOST_WARNED = 3  # films of a process that are named for it
_warned: set[tuple[int, int] | str] = set()  # these, by device and inode, or by name
_COVER_CODECS = ("mjpeg", "png", "bmp", "gif", "tiff", "webp", "jpeg2000", "jpegxl")
_REORDERED = 16  # frames that may be displayed after the last stored one
# What av.open does about metadata that is not UTF-8; PyAV from 19 on takes no such argument.
UNREADABLE_TEXT = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}
_NO_FILM = Disposition.attached_pic | Disposition.timed_thumbnails

# display matrix (axes exchanged, columns mirrored, rows mirrored) -> PIL transpose
_TURNS = {
    (False, True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (False, True, True): Image.Transpose.ROTATE_180,
    (True, False, False): Image.Transpose.TRANSPOSE,
    (True, True, False): Image.Transpose.ROTATE_270,
    (True, False, True): Image.Transpose.ROTATE_90,
    (True, True, True): Image.Transpose.TRANSVERSE,
}


@dataclass(frozen=True)
class Track:
    """The video stream of a file. Times are exact seconds from the first frame.

    Attributes:
      start: first time stamp in ticks; None if frames are only counted.
      tick: length of a tick in seconds.
      rate: frames per second if constant. Time stamps are then rounded to ticks, and frame k is at
        k / rate.
      times: times of all frames, ascending.
    """

    index: int
    start: int | None
    tick: Fraction
    rate: Fraction | None
    duration: Fraction
    times: list[Fraction]

    def time(self, stamp: int | None, order: int) -> Fraction:
        """Display time of a frame, from its time stamp or its order in the decoder's output."""
        if self.start is None or stamp is None:
            return self.times[min(order, len(self.times) - 1)]
        time = (stamp - self.start) * self.tick
        return time if self.rate is None else round(time * self.rate) / self.rate


def read_track(file: BinaryIO, name: str) -> Track:
    """Find the video stream and its frame times from the packets, without decoding.

    An InfiniteVLWarning names a film that states no length, once; the first few of a process.

    Raises:
      InfiniteVLError: unsupported format, no video stream, a truncated or damaged file.
    """
    _check_whole(file, name)
    with open_container(file, name) as container:
        streams = {
            stream.index: stream
            for stream in container.streams.video
            if stream.codec_context and not stream.disposition & _NO_FILM  # None: an unknown codec
        }
        packets: dict[int, list[tuple[int | None, int]]] = {index: [] for index in streams}
        corrupt: dict[int, int] = {}  # stream -> number of packets before the first damaged one
        reached = Fraction(0)
        for packet in container.demux():
            if not packet.size:
                continue
            stamp = packet.pts if packet.pts is not None else packet.dts
            if stamp is not None and packet.time_base:
                reached = max(reached, (stamp + (packet.duration or 0)) * packet.time_base)
            index = packet.stream.index
            if index in packets and not packet.is_discard:
                if packet.is_corrupt:
                    corrupt.setdefault(index, len(packets[index]))
                packets[index].append((stamp, packet.duration or 0))
        stream = _moving(streams, packets, bool(container.streams.audio))
        if stream is None:
            raise InfiniteVLError(
                f"{name} has no video stream that can be decoded (audio and cover"
                " images do not count)",
                "pass a video file; pass a cover image as an image",
            )
        if stream.index in corrupt:
            total = f"{stream.frames:,}" if stream.frames else "its"
            raise InfiniteVLError(
                f"{name} is damaged or cut short after {corrupt[stream.index]:,} of {total} frames",
                DAMAGED,
            )
        kind = container.format.name
        # with all frames that it states, a film is whole (IVF may state frames as its duration)
        whole = 0 < stream.frames <= len(packets[stream.index])
        told = (
            Fraction(container.duration or 0, av.time_base)
            if kind in _STATES_DURATION and not whole
            else 0
        )
        if told - reached > Fraction(1, 4) + told / 100:
            raise InfiniteVLError(
                f"{name} is cut short after {float(reached):.1f} of {float(told):.1f} s", CUT_SHORT
            )
        # FFmpeg reports no size above its limit
        if not 0 < stream.width * stream.height <= MAX_FRAME_PIXELS:
            size = (
                f"of {stream.width:,} x {stream.height:,} pixels"
                if stream.width
                else "of unknown size"
            )
            raise InfiniteVLError(
                f"{name} has frames {size}: damaged, or over the limit of {MAX_FRAME_PIXELS:,}"
                " pixels",
                "shrink it first: ffmpeg -i IN -vf scale=1920:-2 OUT.mp4",
            )
        track = _track(stream, packets[stream.index], kind in _RAW, name)
        states_length = kind in _SHOWS_ITS_END or told or stream.frames
    if track.duration > MAX_SECONDS:
        raise InfiniteVLError(
            f"{name} spans {float(track.duration) / 86_400:,.0f} days by its time stamps", DAMAGED
        )
    if not states_length:
        _warn_of_no_length(file, name, kind)
    return track


def decode(file: BinaryIO, track: Track, name: str) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Decode the frames of a track in display order, with their times.

    Raises:
      InfiniteVLError: the last frames are incomplete, as in a truncated raw stream.
    """
    order, incomplete = 0, None
    with open_container(file, name) as container:
        stream = container.streams[track.index]
        pixels = max(1, stream.width * stream.height)
        stream.thread_type = "AUTO"
        # Each thread holds a frame or two. Raw streams use one thread, because with several FFmpeg
        # may not flag an incomplete frame, and nothing else shows that the stream is truncated.
        most = 1 if container.format.name in _RAW else 16
        stream.codec_context.thread_count = max(
            1, min(most, os.cpu_count() or 1, 4 * MAX_FRAME_PIXELS // pixels)
        )
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        for order, frame in enumerate(container.decode(stream)):
            incomplete = order if frame.is_corrupt else incomplete
            yield track.time(frame.pts if frame.pts is not None else frame.dts, order), frame
    if incomplete is not None and order - incomplete < _REORDERED:
        raise InfiniteVLError(
            f"{name} is cut short or damaged in its last frames, after"
            f" {float(track.duration):.1f} s",
            DAMAGED,
        )


def upright(frame: av.VideoFrame) -> Image.Image:
    """RGB image of a frame, with the display matrix applied to the nearest quarter turn."""
    image = frame.to_image()
    side = frame.side_data.get(Type.DISPLAYMATRIX)
    if side is None:
        return image
    # x' = a x + c y, y' = b x + d y
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].tolist()
    exchanged = abs(b) + abs(c) > abs(a) + abs(d)
    turn = _TURNS.get((exchanged, c < 0, b < 0) if exchanged else (False, a < 0, d < 0))
    return image if turn is None else image.transpose(turn)


def open_container(file: BinaryIO, name: str) -> av.container.InputContainer:
    """Open a container of a listed format, detected by content."""
    file.seek(0)
    formats = ",".join((*_FILMS, *_SOUND))
    try:
        return av.open(
            file,
            options={"format_whitelist": formats, "max_pixels": str(MAX_FRAME_PIXELS)},
            io_open=_open_nothing,
            **UNREADABLE_TEXT,
        )
    except (av.error.FFmpegError, ValueError) as error:
        file.seek(0)
        if kind_of(file.read(400)) in ("image", "both"):
            raise InfiniteVLError(f"{name} is a picture, not a video", OTHER["image"]) from error
        raise InfiniteVLError(
            f"{name} is not a video in a format that is read (MP4, MOV, Matroska, WebM, AVI, MPEG, "
            "FLV, ASF, Ogg, GIF, ...)",
            "play it in a viewer; convert it: ffmpeg -i IN -c:v libx264 OUT.mp4",
        ) from error


def _open_nothing(url: str, flags: int, options: dict) -> NoReturn:
    raise PermissionError(f"refers to another file or address, {url!r}, which is not opened")


def _check_whole(file: BinaryIO, name: str) -> None:
    file.seek(0)
    if kind_of(file.read(400)) == "image":
        raise InfiniteVLError(f"{name} is a picture, not a video", OTHER["image"])
    size, stated = file.seek(0, os.SEEK_END), stated_size(file)
    if stated is not None and stated > size:
        raise InfiniteVLError(f"{name} is cut short after {size:,} of {stated:,} bytes", CUT_SHORT)


def _warn_of_no_length(file: BinaryIO, name: str, kind: str) -> None:
    try:
        status = os.fstat(file.fileno())
        film = (status.st_dev, status.st_ino)
    except OSError:  # in memory
        film = name
    if film in _warned or len(_warned) >= _MOST_WARNED:
        return
    _warned.add(film)
    # without time stamps, as in raw streams, frames out of order cannot be copied to a container
    copied = "" if kind in (*_RAW, "mpeg") else "-c copy "
    last = ". Further films of this kind are not named" if len(_warned) == _MOST_WARNED else ""
    warnings.warn(
        f"{quoted(name)} states no length ({kind}), so a truncated file cannot be told from a"
        " shorter film: check its length against the source, or convert the original:"
        f" ffmpeg -i IN {copied}OUT.mkv{last}",
        InfiniteVLWarning,
        stacklevel=2,
    )


def _moving(
    streams: dict[int, av.VideoStream], packets: dict[int, list], sound: bool
) -> av.VideoStream | None:
    """The video stream: not a preview, then default, largest, longest."""
    counts = Counter({index: len(found) for index, found in packets.items() if found})
    if not counts:
        return None
    most = max(counts.values())
    if (
        most == 1
        and sound
        and all(streams[index].codec_context.name in _COVER_CODECS for index in counts)
    ):
        return None  # cover art that is not marked as such
    # a stream with far fewer frames is a preview
    films = [streams[index] for index, count in counts.items() if 10 * count > most]
    return max(
        films,
        key=lambda s: (
            bool(s.disposition & Disposition.default),
            s.width * s.height,
            counts[s.index],
            -s.index,
        ),
    )


def _track(
    stream: av.VideoStream, packets: list[tuple[int | None, int]], raw: bool, name: str
) -> Track:
    if raw or all(stamp is None for stamp, _ in packets):
        rate = stream.codec_context.framerate
        if not rate:
            raise InfiniteVLError(
                f"{name} is a raw stream that states no frame rate",
                "put it into a container at its true rate: ffmpeg -framerate RATE -i IN -c copy"
                " OUT.mp4",
            )
        times = [k / rate for k in range(len(packets))]
        return Track(stream.index, None, Fraction(1), rate, len(packets) / rate, times)
    packets = sorted(
        (packet for packet in packets if packet[0] is not None), key=lambda packet: packet[0]
    )
    tick, start = stream.time_base, packets[0][0]
    times = [(stamp - start) * tick for stamp, _ in packets]
    last = packets[-1][1] * tick
    rate = stream.guessed_rate or stream.average_rate
    steady = (
        rate
        and all(abs(time - k / rate) < tick for k, time in enumerate(times))
        and (not last or abs(last - 1 / rate) < tick)
    )
    if steady:
        return Track(
            stream.index,
            start,
            tick,
            rate,
            len(times) / rate,
            [k / rate for k in range(len(times))],
        )
    last = last or (
        times[-1] / (len(times) - 1) if times[-1] else 1 / rate if rate else Fraction(1, 25)
    )
    return Track(stream.index, start, tick, None, times[-1] + last, times)
