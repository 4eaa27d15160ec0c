"""Damaged and hostile data files: what is wrong is named, and one bad row costs no other."""

import json

import pytest
from tiny_folder import tiny_config

from infinitevl_jax.config.data import DataConfig, SourceConfig
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.sources import open_source
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.processing import Processor

USER, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}
GOOD = {"conversations": [USER, GPT]}


def said(text):
    return [{"from": "human", "value": text}, GPT]


def asked(*content, **keys):
    messages = [{"role": "user", "content": list(content)}, {"role": "assistant", "content": "a"}]
    return {"messages": messages} | keys


# kind, row, what the error names
BAD_ROWS = {
    "a list": ("llava", [1, 2], "Expected `object`"),
    "no conversations": ("llava", {"image": "a.png"}, "conversations"),
    "a number for a text": (
        "llava",
        {"conversations": [{"from": "human", "value": 3}, GPT]},
        "conversations[0].value",
    ),
    "null for a list": ("llava", {"conversations": None}, "conversations"),
    "an unknown role": (
        "llava",
        {"conversations": [{"from": "bing", "value": "x"}, GPT]},
        "turn 0 is from 'bing'",
    ),
    "no answer": ("llava", {"conversations": [USER]}, "no assistant turn"),
    "the answer first": ("llava", {"conversations": [GPT, USER]}, "an assistant turn first"),
    "an image without a place": (
        "llava",
        {"image": "a.png", "conversations": [USER, GPT]},
        "0 x <image> for 1 images",
    ),
    "a place without an image": (
        "llava",
        {"conversations": said("<image>What?")},
        "1 x <image> for 0 images",
    ),
    "two places, one image": (
        "sharegpt",
        {"images": ["a.png"], "conversations": said("<image><image>")},
        "2 x <image> for 1 images",
    ),
    "an image that is missing": (
        "llava",
        {"image": "gone.png", "conversations": said("<image>")},
        "does not exist",
    ),
    "no picture": (
        "llava",
        {"image": "rows.jsonl", "conversations": said("<image>")},
        "not a picture",
    ),
    "a path outside": (
        "llava",
        {"image": "../a.png", "conversations": said("<image>")},
        "lies outside of",
    ),
    "a path from the root": (
        "llava",
        {"image": "/etc/passwd", "conversations": said("<image>")},
        "lies outside of",
    ),
    "the folder itself": (
        "llava",
        {"image": ".", "conversations": said("<image>")},
        "lies outside of",
    ),
    "a web address": (
        "sharegpt",
        {"images": ["https://x.org/a.png"], "conversations": said("<image>")},
        "is a web address",
    ),
    "a file address": (
        "openai",
        asked({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
        "is a web address",
    ),
    "a number for an image": (
        "llava",
        {"image": 3, "conversations": said("<image>")},
        "an image is 3",
    ),
    "both forms": (
        "sharegpt",
        {"conversations": [USER, GPT], "messages": [{"role": "user", "content": "x"}]},
        "both conversations and messages",
    ),
    "a call that is no JSON": (
        "sharegpt",
        {"conversations": [USER, {"from": "function_call", "value": "run()"}]},
        "the function call of turn 1",
    ),
    "a call that is a list": (
        "sharegpt",
        {"messages": [asked()["messages"][0], {"role": "function_call", "content": [{}]}]},
        "the function call of turn 1 is [{}]",
    ),
    "tools that are a number": (
        "sharegpt",
        {"conversations": [USER, GPT], "tools": 3},
        "tools is 3",
    ),
    "an unknown content type": ("openai", asked({"type": "sound", "sound": "a"}), "sound"),
    "a list for a content type": ("openai", asked({"type": ["image"]}), "unknown type"),
    "an unknown detail": (
        "openai",
        asked({"type": "image", "image": "a.png", "sharp": 3}),
        "sharp",
    ),
    "a weight of a half": (
        "openai",
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y", "weight": 0.5},
            ]
        },
        "weight of a message is 0.5",
    ),
    "no loss at all": (
        "openai",
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y", "weight": 0},
            ]
        },
        "no token of it bears loss",
    ),
    "unequal counts": (
        "questions",
        {"questions": ["a?", "b?"], "answers": ["a"]},
        "2 questions and 1 answers",
    ),
    "an empty text": ("text", {"text": ""}, "the document is empty"),
    "half an emoji": ("text", rb'{"text": "\ud83d"}', "not JSON"),
    "not JSON": ("text", b'{"text": "a"', "not JSON"),
    "NaN": ("text", b'{"text": NaN}', "not JSON"),
    "not UTF-8": ("text", b'{"text": "\xff"}', "'utf-8' codec"),
    "nested too deep": ("openai", b'{"messages": ' + b"[" * 100_000, "messages[0]"),
    "a placeholder spelled": ("llava", {"conversations": said("<|image_pad|>")}, "<|image_pad|>"),
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from tiny_folder import write_tokenizer

    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder)
    return Processor.from_pretrained(folder)


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(case, processor, tmp_path):
    kind, row, reason = BAD_ROWS[case]
    good = {"text": "x"} if kind == "text" else {"questions": ["a?"], "answers": ["a"]}
    good = GOOD if kind in ("llava", "sharegpt") else asked({"type": "text", "text": "x"}) | good
    lines = [json.dumps(good).encode(), row if isinstance(row, bytes) else json.dumps(row).encode()]
    path = tmp_path / "folder" / "rows.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"\n".join([*lines, lines[0]]) + b"\n")
    source = open_source(SourceConfig(kind=kind, path=str(path)), "train")
    encoder = Encoder(source, processor, tiny_config()).within(DataConfig())
    assert encoder.pieces(0) and encoder.pieces(2)
    with pytest.raises(BadRow) as caught:
        encoder.pieces(1)
    error = caught.value
    assert (error.source, error.index) == (str(path), 1) and reason in error.reason, error
    assert len(str(error)) < 2500 and error.cure


FILES = {
    "empty.json": (b"", "is empty"),
    "blank.jsonl": (b" \n \n", "is empty"),
    "nothing.json": (b"[]", "has no rows"),
    "cut.json": (b'[{"text": "a"}, {"te', "a row that cannot be read"),
    "open.json": (b'[{"text": "a"}', "the end is missing"),
    "comma.json": (b'[{"text": "a"} {"text": "b"}]', "no comma between rows"),
    "more.json": (b'[{"text": "a"}] x', "something after the last row"),
    "zeros.json": (b"\0" * 4096, "of no known kind"),
    "page.jsonl": (b"<!DOCTYPE html>\n<html>404</html>\n", "of no known kind"),
    "broken.parquet": (b"PAR1 no more", "is not a parquet file"),
    "broken.txt.xz": (b"\xfd7zXZ\0 no more", "is not a whole .xz file"),
    "empty.txt": (b"", "holds no text"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_none(name, tmp_path):
    content, reason = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InfiniteVLError) as caught:
        open_source(SourceConfig(path=str(tmp_path / name)), "train")
    assert reason in str(caught.value) and name in caught.value.culprit, caught.value


def test_no_file(tmp_path):
    for name in ("gone.json", "gone.txt", "gone"):
        with pytest.raises(InfiniteVLError, match="does not exist"):
            open_source(SourceConfig(path=str(tmp_path / name)), "train")
    (tmp_path / "rows.json").write_text(json.dumps([GOOD]))
    with pytest.raises(
        InfiniteVLError, match="train.data.images is '.*nowhere', which is no folder"
    ):
        open_source(
            SourceConfig(path=str(tmp_path / "rows.json"), images=str(tmp_path / "nowhere")),
            "train",
        )
    with pytest.raises(InfiniteVLError, match="neither metadata.jsonl nor images"):
        open_source(SourceConfig(path=str(tmp_path), kind="image_folder"), "train")


def test_text_that_is_not_utf8(tmp_path, processor):
    (tmp_path / "a.txt").write_bytes(b"good\n" * 30 + b"\xff\xfe\n" + b"good\n" * 30)
    config = SourceConfig(path=str(tmp_path / "a.txt"), options={"chunk": 64})
    source = open_source(config, "train")
    bad = []
    for number in range(len(source)):
        try:
            assert set(source[number].text.split()) == {"good"}
        except BadRow as row:
            bad.append(row)
    assert len(bad) == 1 and "is not UTF-8" in bad[0].reason and bad[0].index == 2


def test_options_that_are_none(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([GOOD]))
    for options, reason in (
        ({"chunk": 64}, "chunk"),
        ({"a": float("nan")}, "a"),
    ):
        with pytest.raises(InfiniteVLError, match=reason) as caught:
            open_source(SourceConfig(path=str(tmp_path / "rows.json"), options=options), "train")
        assert "options of this kind of source: none" in caught.value.cure


def test_parquet_needs_an_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(InfiniteVLError, match=r"pip install 'infinitevl-jax\[parquet\]'"):
        open_source(SourceConfig(path=str(tmp_path / "rows.parquet")), "train")
