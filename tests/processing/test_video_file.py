"""Video files: stream selection, orientation, frame times, isolation from other files."""

import fractions
import os
import shutil

import av
import numpy as np
import pytest
from av.stream import Disposition
from tiny_films import SIZE, add, encode, film

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.positions import VisionItem, vision_positions
from infinitevl_jax.processing.video import VideoOptions, load_video
from infinitevl_jax.processing.video_file import read_track

OPTIONS = VideoOptions(min_pixels=784, max_pixels=6 * 784, patch_size=14)

# some films here state no length, and a process warns of the first few
pytestmark = pytest.mark.filterwarnings("ignore::infinitevl_jax.InfiniteVLWarning")


def two_streams(path, first, second):
    """A file with two video streams, each given as (codec, frames, shade, size, flags)."""
    with av.open(str(path), "w") as container:
        streams = [
            add(container, codec, size, flags=flags) for codec, _, _, size, flags in (first, second)
        ]
        for stream, (_, frames, shade, size, _) in zip(streams, (first, second), strict=True):
            encode(container, stream, [shade] * frames, size)
    return path


DEFAULT = Disposition.default
FLIGHT = ("libx264", 40, 200, SIZE, DEFAULT)
PREVIEWS = {
    "one frame, first": (("mjpeg", 1, 20, (120, 120), Disposition(0)), FLIGHT),
    "one frame, last": (FLIGHT, ("mjpeg", 1, 20, (120, 120), Disposition(0))),
    "one frame, first, marked as default": (
        ("mjpeg", 1, 20, (120, 120), DEFAULT),
        ("libx264", 40, 200, SIZE, Disposition(0)),
    ),
    "three frames, first": (("mjpeg", 3, 20, (120, 120), DEFAULT), FLIGHT),
    "as long, but small": (("libx264", 40, 20, (32, 32), DEFAULT), FLIGHT),
    "as long and large, not default": (("libx264", 40, 20, (128, 96), Disposition(0)), FLIGHT),
    "a cover": (("mjpeg", 1, 20, (120, 120), Disposition.attached_pic), FLIGHT),
}


@pytest.mark.parametrize("case", PREVIEWS)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_the_film_is_found_among_the_streams(tmp_path, case, suffix):
    video = load_video(two_streams(tmp_path / f"a.{suffix}", *PREVIEWS[case]), OPTIONS)
    assert len(video.frames) == 8 and abs(video.frames.mean() - 200) < 6


def song(path, cover=None):
    """Three seconds of silence with a cover image of these flags."""
    with av.open(str(path), "w") as container:
        picture = None if cover is None else add(container, "mjpeg", (120, 120), 1, cover)
        codec = {"mp3": "libmp3lame", "flac": "flac", "wav": "pcm_s16le"}.get(
            path.suffix[1:], "aac"
        )
        sound = container.add_stream(codec, rate=44_100, layout="mono")
        if picture is not None:
            encode(container, picture, [90], (120, 120))
        for i in range(130):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.int16), format="s16", layout="mono"
            )
            frame.rate, frame.pts = 44_100, 1024 * i
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


@pytest.mark.parametrize(
    ("name", "cover"),
    [
        ("a.m4a", None),
        ("a.wav", None),
        ("a.mp4", Disposition.attached_pic),
        ("a.mp3", Disposition.attached_pic),
        ("a.mp4", Disposition(0)),
        ("a.mkv", DEFAULT),
    ],
    ids=["sound", "wav", "cover", "mp3", "unmarked_cover", "cover_marked_as_default"],
)
def test_a_song_is_no_video(tmp_path, name, cover):
    with pytest.raises(InfiniteVLError, match="no video stream"):
        load_video(song(tmp_path / name, cover), OPTIONS)


ONE = 1 << 16


@pytest.mark.parametrize(
    "matrix",
    [(a, b, c, d) for a, d in ((1, 1), (1, -1), (-1, 1), (-1, -1)) for b, c in ((0, 0),)]
    + [(0, b, c, 0) for b in (1, -1) for c in (1, -1)],
)
def test_the_whole_display_matrix_is_applied(tmp_path, matrix):
    size = (112, 56)
    pixels = np.zeros((56, 112, 3), np.uint8)
    pixels[:28, :56] = 250  # bright at the top left
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = add(container, size=size)
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 4 + 20 + 16  # after version, times, id, duration, layer
    a, b, c, d = (ONE * value for value in matrix)
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[place : place + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    found = load_video(bytes(data), OPTIONS).frames[0].astype(int)
    # The bright corner is at (-1, -1) from the centre.
    x, y = -matrix[0] - matrix[2], -matrix[1] - matrix[3]
    rows, columns = found.shape[0] // 2, found.shape[1] // 2
    corner = found[
        slice(rows, None) if y > 0 else slice(rows),
        slice(columns, None) if x > 0 else slice(columns),
    ]
    assert (found.shape[0] > found.shape[1]) == (matrix[0] == 0)
    assert corner.mean() > 200 and (found.sum() - corner.sum()) / (3 * corner.size) < 20


@pytest.mark.parametrize("rate", [30, 24, 12])
def test_a_raw_stream_is_timed_by_the_rate_that_it_states(tmp_path, rate):
    video = load_video(
        film(tmp_path / "a.h264", frames=2 * rate, rate=rate, format="h264", shade=lambda i: 3 * i),
        OPTIONS,
    )
    assert video.times.tolist() == [0, 0.5, 1, 1.5] and video.fps == 2
    np.testing.assert_allclose(video.frames.mean((1, 2, 3)), np.arange(4) * 3 * rate / 2, atol=4)


def test_a_raw_stream_without_a_rate_says_so(tmp_path):
    path = film(tmp_path / "a.obu", "libsvtav1", format="obu")
    with pytest.raises(InfiniteVLError, match="states no frame rate"):
        load_video(path, OPTIONS)


NAMES = [
    "2024-01-01T12:30:00.mp4",
    "12:30.mp4",
    "concat:part.mp4",
    "a%20b#c?.mp4",
    "clip 100%.mp4",
    "%03d.mp4",
    "http:/x/y.mp4",
    "subfile,,start,0,end,100,,:a.mp4",
    "concat:a.mp4|b.mp4",
    "data:video",
    "pipe:0",
    "lavfi:testsrc",
    "-",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return film(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_file_that_lies_there(tmp_path, monkeypatch, clip, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(clip, path)
    want = load_video(clip, OPTIONS)
    for source in (name, str(path), path.as_uri()):
        np.testing.assert_array_equal(load_video(source, OPTIONS).frames, want.frames)


PLAYLISTS = {
    "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{clip}\n#EXT-X-ENDLIST\n",
    "m3u8 of addresses": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nhttp://127.0.0.1:9/v.m3u8\n",
    "ffconcat": "ffconcat version 1.0\nfile '{clip}'\n",
    "sdp": (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 55555 RTP/AVP"
        " 96\na=rtpmap:96 H264/90000\n"
    ),
    "dash": (
        '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
        ' mediaPresentationDuration="PT1S"'
        ' profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet'
        ' mimeType="video/mp4"><Representation id="1"'
        ' bandwidth="1"><BaseURL>{clip}</BaseURL></Representation></AdaptationSet></Period></MPD>'
    ),
    "rtsp": "rtsp://127.0.0.1:9/x\n",
    "vobsub": (
        "# VobSub index file, v7 (do not modify this line!)\nsize: 720x480\nid: en, index:"
        " 0\ntimestamp: 00:00:01:101, filepos: 0\n"
    ),
}


@pytest.mark.parametrize("kind", PLAYLISTS)
@pytest.mark.parametrize("name", ["film.mp4", "film.m3u8", "bytes"])
def test_a_playlist_is_no_video_and_opens_nothing(tmp_path, monkeypatch, clip, kind, name):
    shutil.copyfile(clip, tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    body = PLAYLISTS[kind].replace("{clip}", "clip.mp4").encode()
    (tmp_path / "film").write_bytes(body)
    (tmp_path / name).write_bytes(body)
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with pytest.raises(InfiniteVLError, match="not a video in a format that is read"):
        load_video(body if name == "bytes" else name, OPTIONS)
    if before is not None:
        assert set(os.listdir("/proc/self/fd")) == before


def test_a_movie_that_refers_to_another_file_is_not_followed(tmp_path, clip):
    """A MOV data reference ("url " or "alis") names the file with the samples."""
    data = bytearray(clip.read_bytes())
    place = data.index(b"url ")
    data[place + 7] = 0  # no longer "in this file"
    try:
        video = load_video(bytes(data), OPTIONS)
    except InfiniteVLError:
        return
    np.testing.assert_array_equal(video.frames, load_video(clip, OPTIONS).frames)


def test_what_stands_behind_the_boxes_does_not_count(clip):
    data = clip.read_bytes()
    video = load_video(data + b"SEFT" + bytes(100), OPTIONS)  # as phones append
    np.testing.assert_array_equal(video.frames, load_video(data, OPTIONS).frames)


def late(path, first, frames, rate):
    """A video whose first frame is at `first` / `rate` seconds."""
    with av.open(str(path), "w") as container:
        stream = add(container, rate=rate)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((48, 64, 3), 2 * i, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = first + i, fractions.Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("first", [0, 0.1, 0.7, 12.3, 3600.1])
@pytest.mark.parametrize("rate", [10, 24, 30])
def test_temporal_steps_do_not_depend_on_where_a_video_starts(tmp_path, suffix, first, rate):
    video = load_video(late(tmp_path / f"a.{suffix}", round(first * rate), 4 * rate, rate), OPTIONS)
    assert video.fps == 2 and video.times.tolist() == [0.5 * k for k in range(8)]
    seconds = np.float64(OPTIONS.temporal_patch_size / video.fps)
    assert vision_positions(VisionItem("video", (4, 1, 1), seconds), 0, 2.0)[0].tolist() == [
        0,
        2,
        4,
        6,
    ]


def test_the_times_of_a_track_are_exact(tmp_path):
    path = late(tmp_path / "a.mkv", 7, 90, 30)  # 233, 267, 300 ms
    with open(path, "rb") as file:
        track = read_track(file, "it")
    assert track.times == [fractions.Fraction(i, 30) for i in range(90)] and track.duration == 3


def test_frames_beyond_the_limit_are_named(tmp_path, monkeypatch):
    path = film(tmp_path / "a.mkv", "ffv1", frames=2)
    monkeypatch.setattr("infinitevl_jax.processing.video_file.MAX_FRAME_PIXELS", 3000)
    with pytest.raises(InfiniteVLError, match="over the limit of 3,000 pixels"):
        load_video(path, OPTIONS)


def test_all_frames_together_have_a_stated_limit(clip):
    with pytest.raises(
        InfiniteVLError, match=r"20 frames of .* over the limit of 134,217,728 in all"
    ):
        load_video(
            clip, VideoOptions(min_pixels=1 << 23, max_pixels=1 << 23, fps=10, total_pixels=None)
        )
