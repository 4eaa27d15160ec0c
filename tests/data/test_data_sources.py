"""Every kind of source: its rows as conversations, and the tokens that bear loss."""

import json
import lzma
import pickle
import resource
import tempfile
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from own_data import (
    byte_processor,
    encoder_of,
    learnt,
    rows_of,
    words,
    write_film,
    write_photos,
    write_rows,
)

from infinitevl_jax.config.data import DataConfig, SourceConfig
from infinitevl_jax.data import sources
from infinitevl_jax.data.conversation import Conversation, as_turns
from infinitevl_jax.data.mixture import open_mixture
from infinitevl_jax.errors import BadRow, InfiniteVLError

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PICTURE = "<|vision_start|><I><|vision_end|>"
FILM = "<|vision_start|><V><|vision_end|>"


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    write_photos(folder / "photos")
    write_film(folder / "films" / "film.mp4")
    return folder


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return byte_processor(tmp_path_factory.mktemp("words"))


LLAVA = {
    "id": 7,
    "image": "a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "A cat."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "<image> is a word here."},
    ],
}
SHAREGPT = {
    "conversations": [
        {"from": "human", "value": "<image>One, <image>two, <video>three."},
        {"from": "gpt", "value": "Yes."},
    ],
    "system": "Be brief.",
    "images": ["a.png", "sub/../b.png"],
    "videos": ["film.mp4"],
}
OPENAI = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}},
                {"type": "text", "text": "Which?"},
                {"type": "image", "image": "b.png", "max_pixels": 64},
            ],
        },
        {"role": "assistant", "content": "Both.", "weight": 0},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes.", "weight": 1},
    ]
}
# kind: row, its text, what bears loss
ROWS = {
    "llava": (
        LLAVA,
        SYSTEM
        + turn("user", PICTURE + "What is it?")
        + turn("assistant", "A cat.")
        + turn("user", "Sure?")
        + turn("assistant", "<image> is a word here.")[:-1],
        "A cat.<|im_end|><image> is a word here.<|im_end|>",
    ),
    "sharegpt": (
        SHAREGPT,
        turn("system", "Be brief.")
        + turn("user", f"{PICTURE}One, {PICTURE}two, {FILM}three.")
        + turn("assistant", "Yes.")[:-1],
        "Yes.<|im_end|>",
    ),
    "openai": (
        OPENAI,
        turn("system", "Be kind.")
        + turn("user", f"{PICTURE}Which?{PICTURE}")
        + turn("assistant", "Both.")
        + turn("user", "Sure?")
        + turn("assistant", "Yes.")[:-1],
        "Yes.<|im_end|>",
    ),
    "questions": (
        {"image": "a.png", "questions": ["What?", "Red?"], "answers": ["A cat.", "no"]},
        SYSTEM
        + turn("user", PICTURE + "What?")
        + turn("assistant", "A cat.")
        + turn("user", "Red?")
        + turn("assistant", "no")[:-1],
        "A cat.<|im_end|>no<|im_end|>",
    ),
    "text": (
        {"text": "A tale <|im_end|> é"},
        "A tale <|im_end|> é<|endoftext|>",
        "A tale <|im_end|> é<|endoftext|>",
    ),
}


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("kind", ROWS)
def test_rows(kind, suffix, photos, processor, tmp_path):
    """Found by their keys, and by name, in each kind of file."""
    row, text, said = ROWS[kind]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        if kind == "openai":
            row = {"messages": [{"role": m["role"], "content": "x"} for m in row["messages"]]}
            text = said = None
        pa.parquet.write_table(pa.Table.from_pylist([row] * 3), path, row_group_size=2)
    else:
        write_rows(path, [row] * 3)
    keys = {"images": str(photos / "photos"), "videos": str(photos / "films")}
    for named in ("", kind):
        source = rows_of(path, kind=named, **keys)
        assert len(source) == 3 and source.title == str(path)
        piece = encoder_of(source, processor).conversation(2)
        if text is not None:
            assert words(piece.branch.tokens, processor) == text
            assert learnt(piece, processor) == said


def test_images_that_come_late_in_a_file(photos, tmp_path):
    """LLaVA's files may begin with rows of text."""
    said = LLAVA["conversations"]
    rows = [{"conversations": said[2:]}] * 70 + [LLAVA] * 2
    path = write_rows(tmp_path / "rows.json", rows)
    source = rows_of(path, images=str(photos / "photos"))
    assert source[70].messages[0]["content"][0]["type"] == "image"
    source = rows_of(path, kind="sharegpt", images=str(photos / "photos"))
    with pytest.raises(BadRow, match="row 70: .*the key image") as caught:
        source[70]
    assert "train.data.kind=llava" in caught.value.cure


def test_a_video_s_pixels_come_along(photos, processor, tmp_path):
    path = write_rows(tmp_path / "rows.json", [SHAREGPT])
    source = rows_of(path, images=str(photos / "photos"), videos=str(photos / "films"))
    piece = encoder_of(source, processor).conversation(0)
    assert len(piece.grids) == 2 and piece.grids[:, 0].tolist() == [1, 1]
    assert len(piece.video_grids) == len(piece.seconds) == 1 and piece.video_grids[0, 0] > 1
    assert piece.patches == piece.grids.prod(1).sum() + piece.video_grids.prod()


def test_bytes_in_parquet(photos, processor, tmp_path):
    """As Hugging Face's Image feature stores them."""
    content = (photos / "photos" / "b.png").read_bytes()
    rows = [{"images": [{"bytes": content, "path": None}], "messages": []} for _ in range(2)]
    for row in rows:
        row["messages"] = [
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": "A b."},
        ]
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "part-0.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "part-1.parquet")
    source = rows_of(tmp_path)
    assert len(source) == 4
    piece = encoder_of(source, processor).conversation(3)
    assert learnt(piece, processor) == "A b.<|im_end|>" and piece.patches == 6 * 6


def test_items_whose_images_are_in_a_column(photos, processor, tmp_path):
    """As TRL has them."""
    content = [{"type": "text", "text": "Which?"}, {"type": "image"}, {"type": "image"}]
    row = {
        "images": ["a.png", "b.png"],
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "The second."}]},
        ],
    }
    path = write_rows(tmp_path / "rows.jsonl", [row, row | {"images": ["a.png"]}])
    encoder = encoder_of(rows_of(path, images=str(photos / "photos")), processor)
    piece = encoder.conversation(0)
    assert learnt(piece, processor) == "The second.<|im_end|>"
    assert f"Which?{PICTURE}{PICTURE}" in words(piece.branch.tokens, processor)
    with pytest.raises(BadRow, match="2 x <image> for 1 images"):
        encoder.conversation(1)


def test_function_calls(tmp_path):
    tool = {"name": "weather", "description": "", "parameters": {"type": "object"}}
    row = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"at": "Oslo"}}'},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "No."},
        ],
        "tools": json.dumps([tool]),
    }
    found = rows_of(write_rows(tmp_path / "rows.json", [row]))[0]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"at": "Oslo"}}}
    assert [m["role"] for m in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"] == [call] and found.tools == [tool]


def test_a_row_whose_call_the_template_drops_is_refused(processor, tmp_path):
    row = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {}}'},
        ]
    }
    source = rows_of(write_rows(tmp_path / "rows.json", [row]))
    with pytest.raises(BadRow, match="row 0: .*tool_calls"):
        encoder_of(source, processor).conversation(0)


@pytest.mark.parametrize("listed", [True, False])
def test_image_folders(listed, processor, tmp_path):
    if listed:
        write_photos(tmp_path)
        rows = [{"file_name": f"{n}.png", "text": f"The letter {n}."} for n in "abc"]
        write_rows(tmp_path / "metadata.jsonl", rows)
    else:
        for name in "abc":
            write_photos(tmp_path / f"The letter {name}.", name)
    source = rows_of(tmp_path, options={"question": "Which?"})
    assert len(source) == 3
    turns = as_turns(source[1])
    assert (turns.questions, turns.answers) == (["Which?"], ["The letter b."])
    piece = encoder_of(source, processor).conversation(1)
    assert learnt(piece, processor) == "The letter b.<|im_end|>" and piece.patches


@pytest.mark.parametrize("packed", [False, True])
def test_texts(packed, processor, tmp_path):
    """Rows are lines together; joined, they are the documents."""
    rng = np.random.default_rng(1)
    documents = {}
    for name in ("a", "b/c"):
        lines = ["é" * int(n) for n in rng.integers(0, 60, 40)] + ["word " * 100, "end"]
        documents[name] = "\n".join(lines) + ("\n" if name == "a" else "")
        path = tmp_path / f"{name}.txt"
        path.parent.mkdir(exist_ok=True)
        content = documents[name].encode()
        if packed:
            path = path.with_suffix(".txt.xz")
            content = lzma.compress(content)
        path.write_bytes(content)
    source = rows_of(tmp_path, options={"chunk": 128})
    rows = [source[i] for i in range(len(source))]
    ends = [i for i, row in enumerate(rows) if row.complete]
    assert len(ends) == 2 and ends[1] == len(rows) - 1
    found = ["".join(row.text for row in rows[: ends[0] + 1])]
    found += ["".join(row.text for row in rows[ends[0] + 1 :])]
    assert found == list(documents.values())
    assert max(len(row.text.encode()) for row in rows) <= 192 and min(len(r.text) for r in rows)
    encoder = encoder_of(source, processor).within(DataConfig(length=50))
    pieces = encoder.pieces(ends[0])
    assert all(piece.branch.answer.all() and piece.tokens <= 50 for piece in pieces)
    targets = np.concatenate([piece.branch.tokens[1:] for piece in pieces])
    whole = processor.encode_document(rows[ends[0]].text)
    np.testing.assert_array_equal(targets, whole[1:])


def test_whole_texts_are_held_out(tmp_path):
    """Files are sliced in an order that is not that of their names, and none is divided."""
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i:02}\n" * 20)
    options = {"chunk": 64, "whole": True}
    found = {}
    for split in ("train[:75%]", "train[75%:]", "train"):
        source = rows_of(tmp_path, split=split, options=options)
        rows = [source[i].text for i in range(len(source))]
        found[split] = list(dict.fromkeys(row[5:7] for row in rows))
        assert all("".join(rows).count(f"text {name}\n") == 20 for name in found[split])
    assert [len(names) for names in found.values()] == [15, 5, 20]
    assert found["train[:75%]"] + found["train[75%:]"] == found["train"] != sorted(found["train"])


def test_the_last_line_s_end_is_no_row_of_its_own(tmp_path):
    """Where the last chunk begins inside a line, or a character, at the end of the file."""
    for text in ("a" * 60 + "\n" + "b" * 20 + "\n", "a" * 63 + "é", "a" * 64 + "\n"):
        (tmp_path / "a.txt").write_text(text, "utf-8")
        source = rows_of(tmp_path / "a.txt", options={"chunk": 64})
        assert [
            (row.text, row.complete) for row in map(source.__getitem__, range(len(source)))
        ] == [(text, True)]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def test_a_packed_text_is_unpacked_once(tmp_path, temporary):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"x" * 63 + b"\n" + b"y" * 63 + b"\n"))
    training, held_out = (rows_of(path, split, options={"chunk": 64}) for split in SPLITS)
    assert len(list(temporary.iterdir())) == 1
    copy = pickle.loads(pickle.dumps(training))  # as a worker gets it
    del training
    assert copy[0].text == "x" * 63 + "\n"
    del copy
    assert held_out[0].text == "y" * 63 + "\n" and len(list(temporary.iterdir())) == 1
    del held_out
    assert not list(temporary.iterdir())


SPLITS = ("train[:50%]", "train[50%:]")


def test_a_packed_text_that_has_no_room(tmp_path, temporary, monkeypatch):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(bytes(3 << 20)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(InfiniteVLError, match="no space left for .*infinitevl-") as caught:
            rows_of(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "TMPDIR" in caught.value.cure
    monkeypatch.setattr("infinitevl_jax.data.unpacked.LIMIT", 2 << 20)
    with pytest.raises(InfiniteVLError, match=r"a.txt.xz has more than 2,097,152 bytes unpacked"):
        rows_of(path)
    assert not list(temporary.iterdir())


def test_a_file_is_read_row_by_row(tmp_path):
    """Rows over the borders of what is read at a time, with every kind of character."""
    from infinitevl_jax.data import records

    rows = [{"text": 'é\\ "]}{[,' * n, "n": [n, {"a": [None, 1.5e3]}]} for n in range(1, 40)]
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    path = tmp_path / "rows.json"
    path.write_text("\ufeff \n" + text + "\n\n", "utf-8")
    lines = tmp_path / "rows.jsonl"
    texts = [json.dumps(row, ensure_ascii=False) + "\r\n\n\r\n" for row in rows]
    lines.write_bytes("".join(texts).encode())
    window = records.WINDOW
    try:
        for records.WINDOW in (7, 64, window):
            found = records.JsonRecords(path)
            assert [found.read(i, dict) for i in range(len(found))] == rows
            found = records.JsonRecords(lines)
            assert [found.read(i, dict) for i in range(len(found))] == rows
    finally:
        records.WINDOW = window


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_large_file_is_not_held_in_memory(suffix, tmp_path):
    """32 MB, of which a window of 4 MB is looked at."""
    row = json.dumps({"text": "word " * 2000})
    separator, ends = (",\n", "[]") if suffix == "json" else ("\n", ["", ""])
    path = tmp_path / f"rows.{suffix}"
    path.write_text(ends[0] + separator.join([row] * 3200) + ends[1])
    tracemalloc.start()
    try:
        source = rows_of(path)
        assert len(source) == 3200 and source[3199].text == "word " * 2000
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 32e6 and held < 1e6 and most < 20e6, (held, most)


def test_lines_with_blanks_and_carriage_returns(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n\n{"text": "b"}\n{"text": "c"}')
    source = rows_of(path)
    assert [source[i].text for i in range(len(source))] == ["a", "b", "c"]


def test_splits_of_files(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{n}"} for n in range(10)])

    def rows(split):
        source = rows_of(path, split)
        return "".join(source[i].text for i in range(len(source)))

    assert rows("train") == "0123456789" and rows("train[:90%]") == "012345678"
    assert rows("train[90%:]") == "9" and rows("train[-2:]+train[:1]") == "890"
    for split in ("test", "train[a:]", "train[5:3]", "train[", ""):
        with pytest.raises(InfiniteVLError, match="split|no rows in"):
            rows_of(path, split)


def test_errors_name_the_row_of_the_file(processor, tmp_path):
    """Also of a part of it, whether reading or encoding fails."""
    rows = [{"text": "x"}] * 6 + [{"text": ""}, b"{", {"text": "y"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    encoder = encoder_of(rows_of(path, "train[5:]"), processor)
    for number, record in ((1, 6), (2, 7)):
        with pytest.raises(BadRow, match=f"rows.jsonl row {record}: ") as caught:
            encoder.pieces(number)
        assert caught.value.index == record
    sample = encoder.dataset.sample(2)
    assert len(sample) == 2 and [sample.place(i)[1] for i in range(2)] == [5, 7]


def test_a_kind_from_elsewhere(processor, monkeypatch):
    """A source of one's own is one class and one line."""
    monkeypatch.setattr(sources, "_openers", dict(sources._openers))

    class Sums(Sequence):
        title = "sums"

        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, number):
            question = {"role": "user", "content": f"{number} + 1?"}
            return Conversation([question, {"role": "assistant", "content": f"{number + 1}"}])

    sources.register_source("sums", lambda config, split: Sums(config.options["count"]))
    data = DataConfig(kind="sums", options={"count": 5})
    piece = encoder_of(open_mixture(data), processor).conversation(4)
    assert learnt(piece, processor) == "5<|im_end|>"
    with pytest.raises(InfiniteVLError, match="sums has no rows in 'train'"):
        open_mixture(DataConfig(kind="sums", options={"count": 0}))
    with pytest.raises(InfiniteVLError, match="'llava' exists"):
        sources.register_source("llava", lambda config, split: Sums(1))


def test_unknown_kinds_and_rows(tmp_path):
    path = write_rows(tmp_path / "rows.json", [{"prompt": "a", "response": "b"}])
    with pytest.raises(InfiniteVLError, match="keys prompt, response are of no known kind"):
        rows_of(path)
    with pytest.raises(InfiniteVLError, match="train.data.kind is 'lava'") as caught:
        rows_of(path, kind="lava")
    assert "llava" in caught.value.cure
    with pytest.raises(InfiniteVLError, match="train.data names no data"):
        open_source_of_nothing()


def open_source_of_nothing():
    return sources.open_source(SourceConfig(), "train")
