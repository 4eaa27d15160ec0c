import base64
import io
import math
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as reference_resize,
)

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import images
from infinitevl_jax.processing.images import (
    ImageOptions,
    load_image,
    patchify,
    process_image,
    smart_resize,
)
from infinitevl_jax.processing.video import VideoOptions, load_video


def noise(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def relative_rms(ours, theirs):
    return np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((448, 448), {}, (448, 448)),
        ((42, 140), {}, (56, 140)),  # 1.5 rounds to 2
        ((70, 140), {}, (56, 140)),  # 2.5 rounds to 2: half to even
        ((98, 126), {}, (112, 112)),  # 3.5 -> 4, 4.5 -> 4
        ((20, 20), {}, (56, 56)),  # grows to 3,136 pixels
        ((3000, 4000), {}, (840, 1148)),  # shrinks below 1,003,520
        ((28, 5600), {"max_pixels": 3136}, (28, 784)),  # never below one token
        ((300, 300), {"min_pixels": 200_704}, (448, 448)),
    ],
)
def test_smart_resize_by_the_published_rule(size, limits, expected):
    assert smart_resize(*size, **limits) == expected


def test_smart_resize_equals_transformers():
    rng = random.Random(0)
    for _ in range(2000):
        height, width = rng.randint(1, 3000), rng.randint(1, 3000)
        if max(height, width) > 200 * min(height, width):
            continue
        low, factor = rng.choice([3136, 100_352]), rng.choice([8, 28])
        high = rng.choice([low, 602_112, 12_845_056])
        assert smart_resize(height, width, factor, low, high) == reference_resize(
            height, width, factor, low, high
        )


def test_patches_stand_in_the_published_order():
    options = ImageOptions(patch_size=2, merge_size=2, min_pixels=1)
    frames = noise(8, 12)[None].repeat(3, 0)
    frames[1], frames[2] = frames[1] // 2, 255 - frames[2]
    patches, grid = patchify(frames, options)
    assert grid == (2, 4, 6) and patches.dtype == np.float32
    row = 0
    for t in range(2):
        for merged_row in range(2):
            for merged_column in range(3):
                for i in range(2):
                    for j in range(2):
                        top, left = 4 * merged_row + 2 * i, 4 * merged_column + 2 * j
                        pair = frames[
                            [min(2 * t, 2), min(2 * t + 1, 2)], top : top + 2, left : left + 2
                        ]  # the odd last frame twice
                        want = (pair / 255 - np.asarray(options.mean)) / np.asarray(
                            options.std
                        )  # [2, 2, 2, 3]
                        np.testing.assert_allclose(
                            patches[row], want.transpose(3, 0, 1, 2).reshape(-1), atol=1e-5
                        )
                        row += 1
    assert row == len(patches)


@pytest.mark.parametrize("size", [(448, 448), (61, 203), (17, 40), (900, 1400)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_pixels_equal_transformers(size, mode):
    picture = (
        Image.fromarray(noise(*size, 4), "RGBA")
        if mode == "RGBA"
        else Image.fromarray(noise(*size)).convert(mode)
    )
    limits = {"min_pixels": 50 * 784, "max_pixels": 600 * 784}
    ours, grid = process_image(load_image(picture), ImageOptions(**limits))
    theirs = Qwen2VLImageProcessorPil(**limits)(picture, return_tensors="np")
    assert [list(grid)] == theirs["image_grid_thw"].tolist()
    assert ours.dtype == np.float32
    assert relative_rms(ours, theirs["pixel_values"]) <= 1e-6


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    pixels = noise(30, 40)
    path = tmp_path / "a picture.png"
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (
        path,
        str(path),
        path.as_uri(),
        uri,
        data,
        bytearray(data),
        Image.open(path),
        pixels,
    ):
        picture = load_image(source)
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_camera_orientation_is_applied():
    picture = Image.fromarray(noise(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    file = io.BytesIO()
    picture.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(
        np.asarray(load_image(file.getvalue())), np.rot90(np.asarray(picture), -1)
    )


def test_transparency_becomes_white():
    pixels = noise(4, 4, 4)
    pixels[..., 3] = 0
    assert (np.asarray(load_image(Image.fromarray(pixels, "RGBA"))) == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    picture = np.asarray(load_image(Image.fromarray(grey)))
    np.testing.assert_array_equal(picture[..., 0], grey // 257)


def test_asked_for_sides_are_rounded_and_limited():
    picture = load_image(noise(100, 100))
    assert process_image(picture, ImageOptions(), (280, 570))[1] == (1, 20, 40)
    assert process_image(picture, ImageOptions(max_pixels=78_400), (560, 560))[1] == (1, 20, 20)


def exif_entry(tag, kind, count, value):
    return struct.pack("<HHI", tag, kind, count) + value


TURNED = exif_entry(
    0x112, 3, 1, struct.pack("<HH", 6, 0)
)  # rotate 90 degrees clockwise for display
BEHIND = 8 + 2 + 2 * 12 + 4  # where values that do not fit into an entry stand
SIDE_TAGS = {
    "resolution of -1/0": (
        [TURNED, exif_entry(0x11A, 10, 1, struct.pack("<I", BEHIND))],
        struct.pack("<ii", -1, 0),
    ),
    "resolution as text": ([TURNED, exif_entry(0x11A, 2, 3, b"72\0\0")], b""),
    "resolution NaN": ([TURNED, exif_entry(0x11A, 11, 1, struct.pack("<f", float("nan")))], b""),
    "negative unit": ([TURNED, exif_entry(0x128, 8, 1, struct.pack("<hh", -5, 0))], b""),
    "width as text": ([exif_entry(0x100, 2, 4, b"abc\0"), TURNED], b""),
    "unknown type of value": ([TURNED, exif_entry(0x8769, 99, 1, b"\0\0\0\0")], b""),
    "orientation twice": ([exif_entry(0x112, 3, 2, struct.pack("<HH", 6, 1))], b""),
    "orientation as a byte": ([exif_entry(0x112, 1, 1, b"\6\0\0\0")], b""),
    "orientation as a long": ([exif_entry(0x112, 4, 1, b"\6\0\0\0")], b""),
}


def exif_block(entries, extra=b""):
    return (
        b"Exif\0\0II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + b"".join(entries)
        + b"\0\0\0\0"
        + extra
    )


@pytest.mark.filterwarnings("ignore:Metadata Warning")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("case", SIDE_TAGS)
def test_orientation_is_read_whatever_stands_beside_it(kind, case):
    picture, file = Image.fromarray(noise(20, 30)), io.BytesIO()
    picture.save(
        file,
        kind,
        exif=exif_block(*SIDE_TAGS[case]),
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    stored = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load_image(file.getvalue())), np.rot90(stored, -1))


@pytest.mark.parametrize("value", range(10))
def test_every_orientation(value):
    stored = noise(20, 30)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(stored).save(file, "PNG", exif=exif)
    want = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: np.rot90(stored.transpose(1, 0, 2), 2),
        8: np.rot90(stored),
    }.get(value, stored)
    np.testing.assert_array_equal(np.asarray(load_image(file.getvalue())), want)


def test_a_turned_tiff_is_upright():
    stored, file = noise(20, 30), io.BytesIO()
    Image.fromarray(stored).save(file, "TIFF", tiffinfo={0x0112: 6, 0x0131: "ours"})
    np.testing.assert_array_equal(np.asarray(load_image(file.getvalue())), np.rot90(stored, -1))


def test_exif_that_is_no_exif_leaves_the_pixels():
    stored, file = noise(20, 30), io.BytesIO()
    Image.fromarray(stored).save(file, "PNG", exif=b"Exif\0\0nothing of the kind")
    np.testing.assert_array_equal(np.asarray(load_image(file.getvalue())), stored)


def sample_of(mode):
    """An image in a mode, and its expected RGB over white."""
    base = Image.fromarray(noise(20, 30, 4), "RGBA")
    white = Image.new("RGBA", base.size, (255, 255, 255, 255))
    plain = base.convert("RGB")
    if mode in ("La", "RGBa"):  # what is multiplied by alpha loses digits
        picture = base.convert(mode.upper()).convert(mode)
        return picture, Image.alpha_composite(white, picture.convert(mode.upper()).convert("RGBA"))
    if mode in ("LA", "RGBA"):
        return base.convert(mode), Image.alpha_composite(white, base.convert(mode).convert("RGBA"))
    if mode == "PA":
        picture = base.convert("P").convert("PA")
        return picture, Image.alpha_composite(white, picture.convert("RGBA"))
    if mode == "LAB":
        plain = Image.new("RGB", base.size, (150, 110, 90))
        spaces = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        return ImageCms.profileToProfile(plain, *spaces, outputMode="LAB"), plain
    if mode.startswith("I;16"):
        return Image.new(mode, base.size, 25_700), Image.new("RGB", base.size, (100, 100, 100))
    return plain.convert(mode), plain.convert(mode)


MODES = [
    "1",
    "L",
    "P",
    "RGB",
    "RGBA",
    "CMYK",
    "YCbCr",
    "LAB",
    "HSV",
    "LA",
    "PA",
    "RGBX",
    "RGBa",
    "La",
    "I;16",
    "I;16L",
    "I;16B",
    "I;16N",
]


@pytest.mark.parametrize("rows", [20, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pillow_becomes_rgb_in_bands_of_any_height(monkeypatch, mode, rows):
    monkeypatch.setattr(images, "_BAND_PIXELS", rows * 30)
    picture, want = sample_of(mode)
    assert picture.mode == mode
    found = load_image(picture)
    assert found.mode == "RGB"
    near = 2 if mode == "LAB" else 0  # eight bits of L, a and b hold fewer colours
    np.testing.assert_allclose(
        np.asarray(found).astype(int), np.asarray(want.convert("RGB")).astype(int), atol=near
    )


def test_a_transparent_level_of_sixteen_bit_grey_becomes_white():
    grey = np.full((4, 4), 1000, np.uint16)
    grey[0] = 7
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG", transparency=7)
    picture = np.asarray(load_image(file.getvalue()))
    assert (picture[0] == 255).all() and (picture[1:] == 3).all()


def test_alpha_of_a_large_picture_is_laid_over_white_in_bands(monkeypatch):
    largest = 0

    def composite(under, over):
        nonlocal largest
        largest = max(largest, over.width * over.height)
        return over

    monkeypatch.setattr(Image, "alpha_composite", composite)
    load_image(Image.new("LA", (4000, 3000)))
    assert largest <= images._BAND_PIXELS


def png_header(width, height, colours=6):
    """A PNG of a few bytes that decodes to width x height."""

    def chunk(kind, data):
        return (
            len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
        )

    head = struct.pack(">IIBBBBB", width, height, 8, colours, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(13_300, 13_300), (1 << 26, 3), (60_000, 60_000)])
def test_a_picture_that_unfolds_is_stopped_by_a_stated_limit(size):
    with pytest.raises(InfiniteVLError, match=r"too large.*(134,217,728|178956970)"):
        load_image(png_header(*size))


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PCX", "IM"])
@pytest.mark.parametrize("given", ["bytes", "path"])
def test_only_listed_formats_are_decoded(tmp_path, monkeypatch, kind, given):
    """Pillow would run Ghostscript on the first."""
    monkeypatch.setattr(
        "subprocess.check_call", lambda *a, **k: pytest.fail("a program was started")
    )
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, kind)
    (tmp_path / "photo.jpg").write_bytes(file.getvalue())
    with pytest.raises(InfiniteVLError, match="not a picture in a format that is read"):
        load_image(file.getvalue() if given == "bytes" else tmp_path / "photo.jpg")


def test_an_open_eps_file_is_not_decoded_here():
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "EPS")
    with pytest.raises(InfiniteVLError, match="open EPS file"):
        load_image(Image.open(file))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_pixels": 10**9, "max_pixels": 10**9}, "min_pixels is 1000000000"),
        ({"patch_size": 10**9}, "patch_size is 1000000000"),
        ({"temporal_patch_size": 10**9}, "temporal_patch_size is 1000000000"),
        ({"merge_size": 9}, "merge_size is 9"),
        ({"std": (0.2, 0.0, 0.2)}, "std is"),
        ({"mean": (0.2, math.nan, 0.2)}, "mean is"),
        ({"mean": (0.2, 0.2)}, "mean is"),
        ({"mean": (1e308, 0.2, 0.2)}, "(?s)mean is .*below 1e6"),
        ({"std": (1e-300, 0.2, 0.2)}, "(?s)std is .*above 1e-06"),
        ({"rescale_factor": math.inf}, "rescale_factor is inf"),
        ({"resample": 77}, "resample is 77"),
        ({"max_pixels": "1000"}, "max_pixels is '1000'"),
    ],
)
def test_options_have_stated_limits(options, words):
    with pytest.raises(InfiniteVLError, match=words):
        ImageOptions(**options)


def test_a_resized_picture_has_a_stated_limit():
    with pytest.raises(InfiniteVLError, match="over the limit of 67,108,864"):
        process_image(load_image(noise(28, 28)), ImageOptions(max_pixels=10**9), (20_000, 20_000))


@pytest.mark.parametrize(
    "size", [("8", 8), (8.0, 8), (True, 8), 3, (8,), "88", (8, 8, 3), (0, 8), (float("nan"), 8)]
)
def test_sides_that_are_none_are_refused(size):
    with pytest.raises(InfiniteVLError):
        process_image(load_image(noise(28, 28)), ImageOptions(), size)
    with pytest.raises(InfiniteVLError):
        load_video([load_image(noise(28, 28))] * 2, VideoOptions(), size)
