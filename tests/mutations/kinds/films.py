"""Films.

Containers of many kinds, damaged, cut short, and what makes a decoder open something else.
"""

import functools
import io
import socket
import threading
from random import Random

import av
import numpy as np

from infinitevl_jax.processing import VideoOptions, load_video
from infinitevl_jax.processing.video_file import UNREADABLE_TEXT

from ..case import SAID, Case, Place, refused_only
from ..content import FOREIGN, mutate_bytes
from ..values import BAD
from .processors import picture

FORMATS = [
    ("mp4", "libx264", "yuv420p"),
    ("mov", "mpeg4", "yuv420p"),
    ("matroska", "libx264", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
]
FORMATS += [
    ("avi", "mpeg4", "yuv420p"),
    ("mpegts", "mpeg2video", "yuv420p"),
    ("flv", "flv", "yuv420p"),
    ("gif", "gif", "rgb8"),
    ("mp4", "mpeg4", "yuv420p"),
]
FRAMES, RATE = 20, 10
OPTIONS = VideoOptions(min_pixels=64, max_pixels=4096, patch_size=2, fps=2.0)
SIDE = 48, 64  # height, width


@functools.cache
def encoded(kind: str, codec: str, pixels: str) -> bytes:
    """Two seconds in which the picture grows brighter."""
    file = io.BytesIO()
    # The same bytes each time: no random identifiers, none of x264's analyses that vary.
    with av.open(file, "w", format=kind, options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.height, stream.width, stream.pix_fmt = *SIDE, pixels
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            stream.codec_context.options = {"preset": "ultrafast"}
        for i in range(FRAMES):
            frame = np.full((*SIDE, 3), 10 + 11 * i, np.uint8)
            frame[:, : 3 * i] = 255
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()


@functools.cache
def listener() -> tuple[int, list]:
    """A port of this machine, and who has come there."""
    server, came = socket.create_server(("127.0.0.1", 0)), []

    def accept():
        while True:
            connection, address = server.accept()
            came.append(address)
            connection.close()

    threading.Thread(target=accept, daemon=True).start()
    return server.getsockname()[1], came


def playlists(port: int) -> dict[str, str]:
    """Texts that a decoder may take for a film, and that name other places."""
    address = f"http://127.0.0.1:{port}"
    head = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n"
    return {
        "m3u8 http": f"{head}#EXTINF:10,\n{address}/seg.ts\n#EXT-X-ENDLIST\n",
        "m3u8 local": f"{head}#EXTINF:10,\nother.mp4\n#EXT-X-ENDLIST\n",
        "m3u8 key": f'{head}#EXT-X-KEY:METHOD=AES-128,URI="{address}/key"\n#EXTINF:10,\nother.ts\n',
        "m3u8 master": f"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{address}/v.m3u8\n",
        "concat": "ffconcat version 1.0\nfile other.mp4\n",
        "concat http": f"ffconcat version 1.0\nfile '{address}/x.mp4'\n",
        "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
        '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
        f"<BaseURL>{address}/x.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
        f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "rtsp": f"rtsp://127.0.0.1:{port}/x\n",
        "image list": "photo1.png\nphoto2.png\n",
        "subtitles": "1\n00:00:00,000 --> 00:00:02,000\nhello\n",
    }


def make(rng: Random, place: Place) -> Case:
    chosen = rng.choice(FORMATS)
    way = rng.choice(
        ["bytes"] * 8
        + [
            "cut",
            "cut",
            "whole",
            "playlist",
            "playlist",
            "foreign",
            "path",
            "path",
            "frames",
            "frames",
            "size",
            "audio",
        ]
    )
    data, label = encoded(*chosen), "/".join(chosen[:2])
    (port, came), whole = listener(), 0
    if way == "bytes":
        data, done = mutate_bytes(rng, data, head=400)
        label += f": {done}"
    elif way == "cut":
        whole = FRAMES
        share = rng.uniform(0.05, 0.99)
        data, label = data[: int(len(data) * share)], f"{label}: cut to {share:.0%}"
    elif way == "playlist":
        texts = playlists(port)
        label = rng.choice(list(texts))
        (place.work / "other.mp4").write_bytes(encoded(*FORMATS[0]))
        path = place.work / rng.choice(
            ["film.mp4", "film.m3u8", "film.sdp", "film.mpd", "film.ffconcat"]
        )
        path.write_text(texts[label])
        source = rng.choice([texts[label].encode(), str(path), path])
        return _quiet(
            Case(f"playlist: {label}", lambda: load_video(source, OPTIONS), refused_only(label)),
            came,
        )
    elif way == "foreign":
        label = rng.choice(list(FOREIGN))
        content = FOREIGN[label]
        return Case(f"{label} as a film", lambda: load_video(content, OPTIONS), refused_only(label))
    elif way == "path":
        return _quiet(_path(rng, place, data, port), came)
    elif way == "frames":
        return _frames(rng)
    elif way == "audio":
        return Case("a song", lambda: load_video(_song(), OPTIONS), refused_only("a song"))
    size = (
        rng.choice([(0, 4), (-1, 8), (10**6, 10**6), (8, 8), ("8", 8), (1, 4000), 3])
        if way == "size"
        else None
    )
    if way == "size":
        label += f", size {size}"
        return Case(
            label,
            lambda: load_video(data, OPTIONS, size),
            lambda found: check(found, data, chosen, size),
        )
    source: object = data
    if rng.random() < 0.3:
        path = place.work / rng.choice(
            [
                "film.mp4",
                "a:b.mp4",
                "img%03d.mp4",
                "film?x=1.mp4",
                "concat:x|y.mp4",
                "no suffix",
                "film.m3u8",
                "-x.mp4",
            ]
        )
        path.write_bytes(data)
        source, label = rng.choice([path, str(path)]), f"{path.name!r}, {label}"
    return _quiet(
        Case(
            label,
            lambda: load_video(source, OPTIONS),
            lambda found: check(found, data, chosen, whole=whole),
        ),
        came,
    )


def _quiet(case: Case, came: list) -> Case:
    """The case, wrong where anybody came to the port meanwhile."""
    act, judge = case.action, case.check

    def action():
        came.clear()
        return act()

    case.action = action
    case.check = lambda found: "the network was asked" if came else judge(found)
    return case


def check(found, data: bytes, kind: tuple, size=None, whole: int = 0) -> str:
    """The frames are decoded ones, in their order; what was cut is not taken for a shorter film.

    `whole` counts the frames that the film had before it was cut, 0 where it was not.
    """
    if size is not None and not (
        isinstance(size, tuple) and all(isinstance(s, int) and s > 0 for s in size)
    ):
        return f"accepted size {size!r}"
    frames, times = found.frames, np.asarray(found.times)
    if (
        frames.dtype != np.uint8
        or frames.ndim != 4
        or len(frames) != len(times)
        or not 0 < found.fps < 1e6
    ):
        return f"no film: {frames.dtype} {frames.shape}, fps {found.fps}"
    if not np.isfinite(times).all() or (np.diff(times) < 0).any():
        return f"times that go back: {times.tolist()[:6]}"
    try:
        with av.open(io.BytesIO(data), **UNREADABLE_TEXT) as container:
            stream = next(s for s in container.streams.video)
            decoded = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    except Exception as error:
        return f"accepted what the decoder refuses: {error}"
    # What stands for lost parts of a damaged film depends on the decoder's threads.
    if data == encoded(*kind) and size is None and frames.shape[1:3] == decoded[0].shape[:2]:
        for number, frame in enumerate(frames):
            if (
                min(
                    np.abs(frame.astype(int) - d.astype(int)).max()
                    for d in decoded
                    if d.shape == frame.shape
                )
                > 3
            ):
                return f"frame {number} is none of the film's"
    said = " ".join(SAID).lower()
    if (
        len(decoded) < min(whole, FRAMES - 1)
        and kind[0] in ("mp4", "mov", "matroska", "webm", "avi", "flv")
        and not any(word in said for word in ("cut", "short", "damaged", "broken"))
    ):
        return f"{len(decoded)} of {FRAMES} frames were taken for the whole film without a word"
    return ""


def _path(rng: Random, place: Place, data: bytes, port: int) -> Case:
    (place.work / "a.mp4").write_bytes(data)
    name = rng.choice([
        f"http:/127.0.0.1:{port}/x.mp4", f"http://127.0.0.1:{port}/x", "concat:a.mp4|a.mp4",
        "subfile,,start,0,end,100,,:a.mp4", "img%03d.png", "/dev/zero",
        "data:video/mp4;base64,AAAA", "data:video", "pipe:0", f"tcp://127.0.0.1:{port}",
        f"rtsp://127.0.0.1:{port}/x", "crypto:a.mp4", "file:a.mp4", "async:a.mp4", "cache:a.mp4",
        "lavfi:testsrc", "/dev/video0", "", "a.mp4\0", str(place.work), "x" * 5000, "fd:0",
        f"udp://127.0.0.1:{port}", "\ud83d.mp4", "no.mp4",
    ])  # fmt: skip
    name = name.replace("a.mp4", str(place.work / "a.mp4"))
    return Case(
        f"a path: {name[:60]!r}", lambda: load_video(name, OPTIONS), refused_only(name[:40])
    )


def _frames(rng: Random) -> Case:
    """Films as lists of pictures and as arrays."""
    value = rng.choice([
        [], [picture()], [picture(), picture(5, 9)], [picture(), None], [b"", picture()],
        [[picture()]], picture(), np.zeros((3, 8, 8, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint8), np.array([None]), (picture() for _ in range(3)), {"a": 1},
        [np.zeros((8, 8, 3), np.uint8)] * 3, ["no.png"], *rng.sample(BAD, 4), object(),
        [picture()] * 3000,
    ])  # fmt: skip
    pictures = isinstance(value, list) and {getattr(v, "mode", None) for v in value} == {"RGB"}
    arrays = {getattr(v, "shape", None) for v in value} if isinstance(value, list) else set()
    array = isinstance(value, np.ndarray) and value.ndim == 4 and value.dtype == np.uint8
    good = pictures and len({v.size for v in value}) == 1 or arrays == {(8, 8, 3)}
    good = good or array and value.size and value.shape[-1] == 3

    def checked(found):
        return (
            ("" if len(found.frames) == len(found.times) > 0 else "no film")
            if good
            else f"accepted {value!r:.60}"
        )

    return Case(f"frames {value!r:.80}", lambda: load_video(value, OPTIONS), checked)


@functools.cache
def _song() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 8000), np.int16), format="s16", layout="mono"
        )
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return file.getvalue()
