"""Films cut short: refused, or named where nothing tells them from shorter ones."""

import io
import warnings

import av
import numpy as np
import pytest
from tiny_films import add, film

from infinitevl_jax.errors import InfiniteVLError, InfiniteVLWarning
from infinitevl_jax.processing import video_file
from infinitevl_jax.processing.completeness import stated_size
from infinitevl_jax.processing.frames import film_frames
from infinitevl_jax.processing.video import VideoOptions, check_video, load_video
from infinitevl_jax.processing.video_file import read_track

OPTIONS = VideoOptions(min_pixels=784, max_pixels=6 * 784, patch_size=14)

# some films here state no length, and a process warns of the first few
pytestmark = pytest.mark.filterwarnings("ignore::infinitevl_jax.InfiniteVLWarning")

CONTAINERS = [
    ("mp4", "libx264"),
    ("mov", "mpeg4"),
    ("mkv", "libx264"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("flv", "flv"),
    ("gif", "gif"),
    ("ogg", "libvpx"),
    ("asf", "msmpeg4"),
    ("apng", "apng"),
]


@pytest.mark.parametrize(("suffix", "codec"), CONTAINERS)
def test_a_film_that_is_cut_short_says_so(tmp_path, suffix, codec):
    data = film(tmp_path / f"a.{suffix}", codec, 30).read_bytes()
    whole = load_video(data, OPTIONS)
    assert len(whole.frames) == 6 and whole.times[-1] == pytest.approx(2.5, abs=0.06)
    assert stated_size(io.BytesIO(data)) <= len(data)
    for percent in (10, 25, 50, 75, 90, 95, 99):
        with pytest.raises(InfiniteVLError, match=r"cut short after [\d.,]+ of [\d.,]+ (bytes|s)"):
            load_video(data[: len(data) * percent // 100], OPTIONS)


@pytest.mark.parametrize("suffix, codec", [("ivf", "libvpx"), ("mxf", "mpeg2video")])
def test_a_film_shorter_than_its_header_says_so(tmp_path, suffix, codec):
    data = film(tmp_path / f"a.{suffix}", codec, 40, 25).read_bytes()
    assert len(load_video(data, OPTIONS).frames) == 4
    with av.open(io.BytesIO(data)) as container:
        places = [packet.pos for packet in container.demux(video=0) if packet.size]
    with pytest.raises(InfiniteVLError, match=r"cut short after 0.8 of 1.6 s"):
        load_video(data[: places[20]], OPTIONS)


def test_an_ivf_that_states_its_frames_is_whole(tmp_path):
    """Its header may have more frames than ticks, where some are not shown."""
    data, at = bytearray(film(tmp_path / "a.ivf", "libvpx", 40, 25).read_bytes()), 32
    for k in range(40):
        data[at + 4 : at + 12] = (k // 2).to_bytes(8, "little")
        at += 12 + int.from_bytes(data[at : at + 4], "little")
    assert at == len(data) and len(read_track(io.BytesIO(data), "it").times) == 40


def test_films_that_state_no_length_are_named_once(tmp_path, monkeypatch):
    """Three of a process; the line says what to do. Whole films of other formats are silent."""
    monkeypatch.setattr(video_file, "_warned", set())
    shown = film(tmp_path / "a.ts", "mpeg2video")
    raw = film(tmp_path / "a.h264", format="h264")
    live = film(tmp_path / "live.mkv", container_options={"live": "1"})
    silent = [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.avi", "mpeg4"), ("a.ivf", "libvpx")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, codec in silent:
            load_video(film(tmp_path / name, codec), OPTIONS)
        assert not caught
        check_video(shown)
        load_video(shown.as_uri(), OPTIONS, name="row 7")
        list(film_frames(shown, 2.0)[1])
        for path in (raw, live, film(tmp_path / "b.ts", "mpeg2video"), raw):
            load_video(path, OPTIONS)
    assert {warning.category for warning in caught} == {InfiniteVLWarning}
    told = ", so a truncated file cannot be told from a shorter film: check its length against the"
    cure = " source, or convert the original: ffmpeg -i IN "
    assert [str(warning.message) for warning in caught] == [
        f"video '{shown}' states no length (mpegts){told}{cure}-c copy OUT.mkv",
        f"video '{raw}' states no length (h264){told}{cure}OUT.mkv",
        f"video '{live}' states no length (matroska,webm){told}{cure}-c copy OUT.mkv."
        " Further films of this kind are not named",
    ]


def test_a_transport_stream_ends_with_a_whole_packet(tmp_path):
    data = film(tmp_path / "a.ts", "mpeg2video").read_bytes()
    assert len(load_video(data, OPTIONS).frames) == 4
    with pytest.raises(InfiniteVLError, match="cut short"):
        load_video(data[:-100], OPTIONS)


def test_a_raw_stream_cut_inside_a_frame_says_so(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "a.h264"), "w", format="h264") as container:
        stream = add(container)
        for i in range(20):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.roll(noise, 3 * i, 1), format="rgb24"))
            )
        container.mux(stream.encode())
    data = (tmp_path / "a.h264").read_bytes()
    assert len(load_video(data, OPTIONS).frames) == 4
    with pytest.raises(InfiniteVLError, match="cut short or damaged in its last frames"):
        load_video(data[: len(data) * 6 // 10], OPTIONS)
