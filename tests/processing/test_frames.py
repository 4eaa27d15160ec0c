"""Frames one after another, of films, pipes and cameras, and a thread that gets them ahead."""

import io
import itertools
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.processing import frames as sources
from infinitevl_jax.processing.ahead import Ahead
from infinitevl_jax.processing.frames import (
    at_rate,
    by_clock,
    camera_frames,
    film_frames,
    is_device,
    jpeg_frames,
    paced,
    raw_frames,
)


def shade(level, size=(16, 16)):
    return Image.new("RGB", size, (level,) * 3)


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """20 frames, 10 a second, each 10 levels lighter."""
    path = tmp_path_factory.mktemp("film") / "film.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        for i in range(20):
            container.mux(stream.encode(av.VideoFrame.from_image(shade(10 * i))))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("fps", "numbers"), [(2, [0, 5, 10, 15]), (4, [0, 3, 5, 8, 10, 13, 15, 18])]
)
def test_a_film_at_a_rate(film, fps, numbers):
    """The first frame of each step, at its own time."""
    count, found = film_frames(film, fps)
    found = list(found)
    assert count == len(found) and [time for time, _ in found] == [Fraction(n, 10) for n in numbers]
    assert [image.getpixel((3, 3))[0] for _, image in found] == [10 * n for n in numbers]


def test_every_frame_of_a_slow_film(film):
    assert film_frames(film, 100)[0] == 20
    times = [Fraction(k, 3) for k in (0, 1, 2, 30, 31)]
    assert [t for t, _ in paced(((t, None) for t in times), 1)] == [0, 10, Fraction(31, 3)][:2]


def test_a_film_is_not_in_memory(film):
    """Frames are decoded as they are asked for."""
    _, found = film_frames(film, 10)
    assert next(found)[0] == 0
    found.close()


def test_films_that_are_none(film, tmp_path):
    whole = film.read_bytes()
    for name, content, culprit in (
        ("empty", b"", "empty file"),
        ("cut", whole[: len(whole) // 2], "cut short|damaged"),
        ("words", b"words " * 100, "not a video"),
        ("picture.jpg", jpeg(shade(3)), "is a picture"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InfiniteVLError, match=culprit):
            film_frames(tmp_path / name, 2)
    for path, culprit in (
        ("http://host/film.mp4", "web address"),
        (tmp_path / "none", "does not exist"),
        (tmp_path, "folder"),
    ):
        with pytest.raises(InfiniteVLError, match=culprit):
            film_frames(path, 2)


def test_motion_jpeg_of_changing_sizes():
    images = [shade(10, (16, 16)), shade(90, (40, 24)), shade(200, (8, 8)), shade(30, (16, 16))]
    found = list(jpeg_frames(io.BytesIO(b"".join(map(jpeg, images)))))
    assert [image.size for image in found] == [image.size for image in images]
    assert [image.getpixel((3, 3))[0] for image in found] == [10, 90, 200, 30]
    assert [t for t, _ in at_rate(iter(found), 4)] == [Fraction(k, 4) for k in range(4)]


def test_damaged_motion_jpeg():
    """What came before is given, then the frame is named."""
    good = jpeg(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)))
    found = jpeg_frames(io.BytesIO(good + good + good[: len(good) // 2]))
    assert next(found).size == next(found).size == (32, 32)
    with pytest.raises(InfiniteVLError, match="frame 2 of standard input is damaged"):
        next(found)
    with pytest.raises(InfiniteVLError, match="no motion JPEG"):
        next(jpeg_frames(io.BytesIO(b"RIFF" + good)))
    assert list(jpeg_frames(io.BytesIO(b""))) == []


def test_endless_motion_jpeg_is_refused(monkeypatch):
    monkeypatch.setattr(sources, "_MAX_JPEG", 1 << 18)
    with pytest.raises(InfiniteVLError, match="frame 0 .* more than 262,144 bytes"):
        next(jpeg_frames(io.BytesIO(jpeg(shade(1))[:-2] + bytes(1 << 20))))


def test_raw_frames():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)

    class Pipe(io.BytesIO):
        def read(self, most=-1):
            return super().read(min(most, 100))  # as much as has come

    found = list(raw_frames(Pipe(pixels.tobytes()), (8, 6)))
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in found]), pixels)
    cut = raw_frames(Pipe(pixels.tobytes()[:-5]), (8, 6))
    assert len([next(cut), next(cut)]) == 2
    with pytest.raises(InfiniteVLError, match="inside frame 2: 139 of 144 bytes"):
        next(cut)
    with pytest.raises(InfiniteVLError, match="0 x 4 pixels"):
        next(raw_frames(Pipe(), (0, 4)))


def test_a_clock():
    clock = iter([100.0, 100.3, 100.5, 100.9, 101.2])
    found = by_clock(iter([shade(k) for k in range(5)]), 2, lambda: next(clock))
    assert [(float(t), image.getpixel((0, 0))[0]) for t, image in found] == [
        (0, 0),
        (0.5, 2),
        (1.2, 4),
    ]


def test_cameras(monkeypatch, film):
    assert is_device("/dev/null") and not is_device(film) and not is_device("none")
    with pytest.raises(InfiniteVLError, match="camera /dev/null: Inappropriate ioctl"):
        next(camera_frames("/dev/null"))
    opened, seen = av.open, []

    def device(path, format):
        seen.append((path, format))
        return opened(str(film))

    monkeypatch.setattr(sources.av, "open", device)
    assert len(list(camera_frames("/dev/video0"))) == 20
    assert seen == [("/dev/video0", "v4l2")]


def test_ahead_waits():
    """Not more than `waiting` items are held, and none is lost."""
    made = []

    def items():
        for i in range(50):
            made.append(i)
            yield i

    ahead = Ahead(items(), 3, live=False)
    seen = []
    for item in ahead:
        seen.append(item)
        assert len(made) <= len(seen) + 4
    assert seen == list(range(50)) and ahead.dropped == 0


def test_ahead_drops_the_oldest():
    come = threading.Event()

    def items():
        yield from range(10)
        come.set()

    ahead = Ahead(items(), 3, live=True)
    assert come.wait(10)
    assert list(ahead) == [7, 8, 9] and ahead.dropped == 7


def test_ahead_hands_errors_over_and_stops():
    def failing():
        yield 1
        raise InfiniteVLError("a frame is damaged", "send another")

    found = iter(Ahead(failing(), 4, live=False))
    assert next(found) == 1
    with pytest.raises(InfiniteVLError, match="a frame is damaged"):
        next(found)
    never, asked = threading.Event(), itertools.count()

    def silent():
        never.wait(60)
        yield 1

    assert list(Ahead(silent(), 4, live=False, stopped=lambda: next(asked) > 2)) == []
    never.set()
    closed = Ahead(itertools.count(), 2, live=False)
    assert next(iter(closed)) == 0
    closed.close()
    assert list(closed) == []
