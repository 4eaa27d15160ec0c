"""Sources of images: a name is always a single file; data: URLs are read as in browsers."""

import base64
import io
import os

import numpy as np
import pytest
from PIL import Image

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import Processor, load_image
from infinitevl_jax.processing.sources import kind_of, open_source

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)


def png():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    return file.getvalue()


FLAT = base64.b64encode(png()).decode()
WRAPPED = base64.encodebytes(png()).decode()
NAMES = [
    "2024-01-01T12:30:00.png",
    "12:30.png",
    "concat:part.png",
    "a%20b#c?.png",
    "100%.png",
    "%03d.png",
    "data:image",
    "http:x",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["relative", "absolute", "url"])
def test_a_name_is_the_file_that_lies_there(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(png())
    source = {"relative": name, "absolute": str(path), "url": path.as_uri()}[kind]
    np.testing.assert_array_equal(np.asarray(load_image(source)), PIXELS)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + FLAT,
        "data:image/png;base64," + WRAPPED,
        "data:image/png;base64," + WRAPPED.replace("\n", "\r\n"),
        "data:image/png;base64," + FLAT + "\n",
        "data:image/png;base64," + "\t ".join(FLAT[i : i + 70] for i in range(0, len(FLAT), 70)),
        "data:image/png;base64," + FLAT.rstrip("="),
        "data:image/png;base64," + FLAT.replace("+", "-").replace("/", "_"),
        "data:image/png;base64," + FLAT.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
        "DATA:image/png;name=a.png;Base64," + FLAT,
        "data:image/png," + "".join(f"%{byte:02x}" for byte in png()),
    ],
    ids=[
        "flat",
        "wrapped",
        "carriage_returns",
        "newline",
        "tabs",
        "no_padding",
        "url_safe",
        "escaped",
        "capitals",
        "no_base64",
    ],
)
def test_a_data_url_is_read_as_browsers_read_it(url):
    np.testing.assert_array_equal(np.asarray(load_image(url)), PIXELS)


@pytest.mark.parametrize("content", ["@@@", "é", "AAAAA", "\ud83d"])
def test_what_is_no_base64_is_refused(content):
    with pytest.raises(InfiniteVLError, match="not valid base64"):
        load_image("data:image/png;base64," + content)


@pytest.mark.parametrize("scheme", ["http", "HTTPS", "s3", "rtsp", "ftp"])
def test_web_addresses_are_refused_by_name(scheme):
    with pytest.raises(InfiniteVLError, match=f"{scheme}://example.org/a.png' is a web address"):
        load_image(f"{scheme}://example.org/a.png")


def test_a_file_of_another_machine_is_refused():
    with pytest.raises(InfiniteVLError, match="another machine, 'server'"):
        load_image("file://server/a.png")


@pytest.mark.parametrize("noun", ["image", "video"])
def test_only_regular_files_are_opened(tmp_path, noun):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(InfiniteVLError, match="not a regular file"):
            open_source(path, "it", noun)
    with pytest.raises(InfiniteVLError, match="cannot be read"):
        open_source("a\0b", "it", noun)


CONTENT = {
    "OpenAI": {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + FLAT, "detail": "auto"},
    },
    "OpenAI, as a string": {"type": "image_url", "image_url": "data:image/png;base64," + FLAT},
    "OpenAI's responses": {
        "type": "input_image",
        "image_url": "data:image/png;base64," + FLAT,
        "detail": "auto",
    },
    "url": {"type": "image", "url": "data:image/png;base64," + WRAPPED},
    "path": {"type": "image", "path": "12:30.png", "url": None},
    "file url": {"type": "image", "url": "file://{folder}/12:30.png"},
    "base64": {"type": "image", "base64": WRAPPED},
}


@pytest.mark.parametrize("item", CONTENT.values(), ids=CONTENT)
def test_items_in_other_interfaces_spelling(tmp_path, monkeypatch, byte_folder, item):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30.png").write_bytes(png())
    processor = Processor.from_pretrained(byte_folder)
    item = {
        key: value.replace("{folder}", str(tmp_path)) if isinstance(value, str) else value
        for key, value in item.items()
    }

    def ask(part):
        return processor([{"role": "user", "content": [part, {"type": "input_text", "text": "?"}]}])

    want = ask({"type": "image", "image": Image.fromarray(PIXELS)})
    found = ask(item)
    assert found.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(found[name], want[name])


def test_a_path_is_never_read_as_a_url(tmp_path, monkeypatch, byte_folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InfiniteVLError, match="does not exist"):
        Processor.from_pretrained(byte_folder)(
            [{"role": "user", "content": [{"type": "image", "path": "http://x/y.png"}]}]
        )


def test_the_first_bytes_tell_pictures_from_films():
    assert kind_of(png()) == "both" and kind_of(b"\xff\xd8\xff\xe0") == "image"
    assert kind_of(b"\0\0\0\x20ftypisom") == "video" and kind_of(b"\0\0\0\x20ftypavif") == "image"
    assert kind_of(b"RIFF\0\0\0\0WEBP") == "image" and kind_of(b"RIFF\0\0\0\0AVI ") == "video"
    assert kind_of(b"\x47" + bytes(187) + b"\x47" + bytes(187) + b"\x47") == "video"
    assert kind_of(b"") is None and kind_of(b"hello") is None
