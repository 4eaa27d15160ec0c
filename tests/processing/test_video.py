import fractions

import av
import numpy as np
import pytest
from PIL import Image

from infinitevl_jax.processing.images import patchify
from infinitevl_jax.processing.video import VideoOptions, load_video, sample_count

SMALL = {"min_pixels": 784, "max_pixels": 6 * 784, "patch_size": 14}


def make_video(path, times, shade, size=(64, 48), codec="libx264", rate=30):
    """A video with frame i at times[i] seconds, of grey shade(i)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 2  # shades have to survive
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for i, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(
                np.full((size[1], size[0], 3), shade(i), np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = round(time * 1000), fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(video, step):
    """Index of each sampled frame, by its shade."""
    return np.round(video.frames.mean(axis=(1, 2, 3)) / step).astype(int).tolist()


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_steady_video_is_sampled_evenly(tmp_path, codec):
    path = make_video(
        tmp_path / "steady.mp4", np.arange(50) / 10, lambda i: 5 * i, codec=codec, rate=10
    )
    video = load_video(path, VideoOptions(**SMALL))
    assert numbers(video, 5) == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert video.fps == pytest.approx(2.0, rel=1e-3)
    np.testing.assert_allclose(video.times, np.arange(10) / 2, atol=1e-3)


def test_varying_frame_rate_keeps_true_time(tmp_path):
    # Dense for a second, then one frame per second: sampling by frame number would take only the
    # first second.
    times = [*np.arange(20) / 20, 1, 2, 3, 4, 5, 6, 7]
    video = load_video(
        make_video(tmp_path / "vary.mp4", times, lambda i: 9 * i), VideoOptions(fps=1.0, **SMALL)
    )
    assert len(video.times) == 8 and video.fps == pytest.approx(1.0, rel=0.02)
    np.testing.assert_allclose(video.times, np.arange(8), atol=0.051)
    assert numbers(video, 9)[1:] == [20, 21, 22, 23, 24, 25, 26]


def test_nearest_frame_is_chosen_and_may_repeat(tmp_path):
    # Targets are 0, 1, 2, 3, ... (8 frames in 8 s); there are no frames between 0.9 and 6 s.
    times = [0, 0.4, 0.9, 6.0, 6.9, 7.0, 7.1, 7.2, 7.3, 7.9]
    video = load_video(
        make_video(tmp_path / "gap.mp4", times, lambda i: 25 * i), VideoOptions(fps=1.0, **SMALL)
    )
    assert numbers(video, 25) == [0, 2, 2, 2, 3, 3, 3, 5]


@pytest.mark.parametrize(
    ("frames", "taken", "steps"), [(1, 1, 1), (3, 3, 2), (4, 4, 2), (7, 6, 3), (45, 14, 7)]
)
def test_counts_are_even_and_the_odd_last_frame_repeats(tmp_path, frames, taken, steps):
    path = make_video(tmp_path / "odd.mp4", np.arange(frames) / 5, lambda i: 5 * i)
    options = VideoOptions(**SMALL, fps=1.6 if frames == 45 else 5.0)
    video = load_video(path, options)
    assert len(video.frames) == taken
    patches, grid = patchify(video.frames, options)
    assert grid[0] == steps
    if taken % 2:
        last = patches.reshape(steps, -1, 3, 2, 14, 14)[-1]
        np.testing.assert_array_equal(last[:, :, 0], last[:, :, 1])


def test_count_follows_rate_and_limits():
    options = VideoOptions()
    assert sample_count(10.0, 300, options) == 20
    assert sample_count(9.998, 300, options) == 20
    assert sample_count(1.0, 30, options) == 4  # the minimum
    assert sample_count(4000.0, 10**6, options) == 768  # the maximum
    assert sample_count(10.6, 300, options) == 20  # 21 is odd
    assert sample_count(10.0, 3, options) == 3  # no more than there are
    assert sample_count(10.0, 300, VideoOptions(num_frames=9)) == 8


def test_a_video_that_starts_late_is_timed_from_its_first_frame(tmp_path):
    path = make_video(tmp_path / "late.mkv", 100 + np.arange(20) / 10, lambda i: 12 * i)
    video = load_video(path, VideoOptions(**SMALL))
    assert video.times[0] == 0 and video.fps == pytest.approx(2.0, rel=0.06)


def test_a_duration_that_is_rounded_gives_the_rate_that_was_asked_for(tmp_path):
    # Irregular, and 2 ms short of 10 s: 19.996 frames at 2 fps count as 20, half a second apart.
    path = make_video(
        tmp_path / "short.mkv",
        [*np.arange(60) / 10, *np.arange(60, 100) / 10 - 0.002],
        lambda i: i,
        rate=10,
    )
    video = load_video(path, VideoOptions(**SMALL))
    assert len(video.frames) == 20 and video.fps == 2


def test_frames_are_taken_as_sampled_already(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 56, 84, 3), dtype=np.uint8)
    options = VideoOptions(**{**SMALL, "min_pixels": 56 * 84}, fps=4.0)
    video = load_video(array, options)
    np.testing.assert_array_equal(video.frames, array)
    assert video.fps == 4.0
    Image.fromarray(array[0]).save(tmp_path / "0.png")
    mixed = load_video(
        [tmp_path / "0.png", *array[1:3], *(Image.fromarray(frame) for frame in array[3:])], options
    )
    np.testing.assert_array_equal(mixed.frames, array)


def test_frame_size_keeps_the_limits():
    options = VideoOptions()
    height, width = options.frame_size(1080, 1920, 20)
    assert height % 28 == width % 28 == 0 and 500_000 < height * width <= 602_112
    height, width = options.frame_size(100, 100, 20)
    assert height * width >= 100_352
    shared = VideoOptions(total_pixels=4_000_000)
    height, width = shared.frame_size(1080, 1920, 40)
    assert 150_000 < height * width <= 4_000_000 / 40 * 2
    assert np.prod(shared.frame_size(1080, 1920, 760)) <= 1.05 * 100_352  # the floor of a share


def test_bytes_equal_the_file(tmp_path):
    path = make_video(tmp_path / "v.mp4", np.arange(12) / 6, lambda i: 20 * i)
    a, b = (
        load_video(path, VideoOptions(**SMALL)),
        load_video(path.read_bytes(), VideoOptions(**SMALL)),
    )
    np.testing.assert_array_equal(a.frames, b.frames)
    assert a.fps == b.fps


def test_a_phone_video_is_turned_upright(tmp_path):
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 112, 56, "yuv420p"
        pixels = np.zeros((56, 112, 3), np.uint8)
        pixels[:, :56] = 255  # white on the left; at the top after a clockwise turn
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 4 + 20 + 16  # after version, times, id, duration, layer
    data[matrix : matrix + 36] = b"".join(
        int(v).to_bytes(4, "big", signed=True) for v in (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    )
    video = load_video(bytes(data), VideoOptions(**SMALL))
    top, bottom = np.split(video.frames[0].astype(int), 2)
    assert top.mean() > 230 and bottom.mean() < 25
