"""Rows of every kind: none is encoded by what another was, an epoch has each once, and what is
wrong with one names it."""

import dataclasses

import numpy as np
import pytest
from tiny_run import write_preset

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.data.conversation import as_turns, from_questions
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.pipeline import count_steps, held_out_batches, train_batches
from infinitevl_jax.data.sources import readable
from infinitevl_jax.data.sources.tfds import Dataset, _texts
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.inputs.packing import Packing
from infinitevl_jax.processing import ChatTemplate, Processor
from infinitevl_jax.train.setup import prepare_start


class Rows:
    """A source that stands in for a prepared data set."""

    name, split, title = "rows", "train", "rows train"

    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, number):
        return self.rows[number]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("run")
    preset = load_preset(write_preset(folder, tiny_data))
    source = Dataset("tiny_vqa", tiny_data, "train[:75%]")
    return source, prepare_start(preset.model, source, folder, 0)


@pytest.fixture(scope="module")
def headed(made):
    """A processor whose template opens every conversation with words of its own, and the
    configuration."""
    start = made[1]
    header = (
        "what color <|im_end|>{% if messages[0].content is string %}is it <|im_end|>{% endif %}"
    )
    template = ChatTemplate(header + start.processor.template.text, "test")
    return Processor(start.processor.tokenizer, template, start.processor.images), start.config


def test_a_row_is_encoded_alike_whatever_came_before(made, headed):
    """With and without a picture, and with pictures of two sizes: the same words are asked of
    each."""
    source, _ = made
    image, turns = as_turns(source[0]).image, (["what color is it?", "is it red?"], ["red", "yes"])
    rows = Rows(
        from_questions(image, *turns),
        from_questions(b"", *turns),
        from_questions(as_turns(source[1]).image, *turns),
    )
    orders = [Encoder(rows, *headed) for _ in range(3)]
    for encoder, order in zip(orders, ([0, 1, 2], [1, 0, 2], [2, 1, 0]), strict=True):
        for number in order:
            encoder[number]
    for number in range(3):
        wholes = [
            [np.concatenate([row.prefix.tokens, b.tokens]).tolist() for b in row.branches]
            for row in (e[number] for e in orders)
        ]
        assert wholes[0] == wholes[1] == wholes[2]
        content = (
            [{"type": "image", "image": as_turns(rows[number]).image}]
            if as_turns(rows[number]).image
            else []
        )
        for i, whole in enumerate(wholes[0]):
            message = {"role": "user", "content": [*content, {"type": "text", "text": turns[0][i]}]}
            prompt = headed[0]([message])["input_ids"][0].tolist()
            assert whole[: len(prompt)] == prompt


def test_a_template_whose_header_tells_the_question_is_refused_in_every_order(made, headed):
    """The second row's turns are known from the first, but their headers differ."""
    source, start = made
    template = ChatTemplate(
        "{{ messages[0].content[1].text }}" + start.processor.template.text, "test"
    )
    processor = Processor(start.processor.tokenizer, template, start.processor.images)
    image = as_turns(source[0]).image
    rows = Rows(
        from_questions(image, ["is it red?"], ["yes"]),
        from_questions(image, ["what color is it?", "is it red?"], ["red", "yes"]),
    )
    encoder = Encoder(rows, processor, headed[1])
    encoder[0]
    with pytest.raises(
        BadRow, match="rows train row 1: the chat template writes something before the image"
    ):
        encoder[1]


@pytest.fixture
def packing(made):
    source, start = made
    data = DataConfig(questions=0, batch=2, length=40, patches=64)
    return Encoder(source, start.processor, start.config), start.config, data


def test_an_epoch_of_packed_rows_has_every_conversation_once(packing):
    encoder, config, data = packing
    data = dataclasses.replace(data, length=80)
    counts = [count_steps(encoder, data, epochs, 5) for epochs in (1, 2, 3)]
    conversations = sorted(
        encoder.conversation(i).branch.tokens.tobytes() for i in range(len(encoder))
    )

    def contents(batch):
        for row in range(data.batch):
            for segment in range(batch.branches.segment_ids[row].max() + 1):
                here = (batch.branches.segment_ids[row] == segment) & (
                    batch.branches.token_index[row] >= 0
                )
                if here.any():
                    last = batch.targets[row][here][-1:]
                    yield (
                        np.concatenate([batch.branches.tokens[row][here], last])
                        .astype(np.int32)
                        .tobytes()
                    )

    for epochs, count in enumerate(counts, 1):
        batches = train_batches(encoder, config, data, 5, epochs=epochs)
        found = [c for _ in range(count) for c in contents(next(batches))]
        assert sorted(found) == sorted(conversations * epochs)
        with pytest.raises(InfiniteVLError, match="at its end"):
            next(batches)
    tokens = sum(encoder.conversation(i).tokens for i in range(len(encoder)))
    assert (
        counts[0] >= tokens / (data.batch * data.length) and counts[2] < 18
    )  # six steps or more an epoch would be two to a row
    assert count_steps(encoder, data, 0.01, 5) == 1


def test_steps_of_branches_follow_the_images(packing):
    encoder, _, data = packing
    data = dataclasses.replace(data, questions=2, batch=6)
    assert [count_steps(encoder, data, epochs, 0) for epochs in (1, 2.5, 0.01)] == [3, 8, 1]


def test_unusable_rows_are_no_part_of_an_epoch(packing, monkeypatch):
    encoder, _, data = packing
    longest = max(encoder.conversation(i).tokens for i in range(len(encoder)))
    short = dataclasses.replace(data, batch=1, length=longest - 1, lookahead=1)
    fitting = [i for i in range(len(encoder)) if encoder.conversation(i).tokens < longest]
    steps = [Packing(1, short.length)]
    for number in fitting:  # any order: these conversations have two lengths at most
        tokens = encoder.conversation(number).tokens
        if not steps[-1].add(tokens):
            steps.append(Packing(1, short.length))
            assert steps[-1].add(tokens)
    assert 0 < len(fitting) < len(encoder)
    assert abs(count_steps(encoder, short, 1, 0) - len(steps)) <= 1


GOOD = (["is it red?"], ["yes"])
BAD = {
    "broken image": (from_questions(b"no picture", *GOOD), {}, "not a picture"),
    "half an emoji in a question": (from_questions(b"", ["is it \ud83d?"], ["yes"]), {}, "U+D83D"),
    "half an emoji in an answer": (from_questions(b"", ["is it red?"], ["\ud83d"]), {}, "U+D83D"),
    "placeholder in a question": (
        from_questions(b"", ["is it <|image_pad|>?"], ["yes"]),
        {},
        "<|image_pad|>",
    ),
    "long answer": (
        from_questions(b"", ["is it red?"], ["red " * 50]),
        {"length": 40},
        "train.data.length is 40",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("questions", [1, 0], ids=["branches", "packed"])
def test_a_bad_row_is_named(made, case, questions):
    row, changes, reason = BAD[case]
    start = made[1]
    data = DataConfig(
        questions=questions, batch=1, max_skipped=0.0, **{"length": 60, "patches": 64, **changes}
    )
    encoder = Encoder(Rows(from_questions(b"", *GOOD), row), start.processor, start.config).within(
        data
    )
    read = encoder.__getitem__ if questions else encoder.conversation
    read(0)
    with pytest.raises(BadRow) as caught:
        read(1)
    error = caught.value
    assert (error.source, error.index) == ("rows train", 1) and reason in error.reason
    assert str(error).startswith("rows train row 1: ") and error.cure
    with pytest.raises(BadRow, match="rows train row 1: "):
        list(held_out_batches(encoder, start.config, data))


def test_an_image_too_large_is_named(made):
    source, start = made
    encoder = Encoder(source, start.processor, start.config)
    with pytest.raises(
        BadRow, match="row 2: the conversation takes 16 patches, train.data.patches is 8"
    ):
        encoder.within(DataConfig(questions=0, length=60, patches=8)).conversation(2)
    with pytest.raises(
        BadRow, match="row 2: the image's prefix has 6 tokens, train.data.prefix_length is 5"
    ):
        encoder.within(DataConfig(questions=1, prefix_length=5))[2]


@pytest.fixture
def stored(made, monkeypatch):
    """A prepared data set with other contents."""

    def replace(*rows):
        source = Dataset.__new__(Dataset)
        source.name, source.split, source._rows = "stored", "train", rows
        return source

    return replace


def test_what_is_stored_wrongly_is_named(stored):
    source = stored(
        {"questions": [b"a?"], "answers": [b"a"]},
        {"questions": [b"a?", b"b?"], "answers": [b"a"]},
        {"questions": [], "answers": []},
        {"questions": [b"\xff\xfe"], "answers": [b"a"]},
        {"questions": b"a?", "answers": [b"a"]},
        {"questions": [["a?"]], "answers": [b"a"]},
        {"questions": [b"a?"], "answers": None},
        {"questions": [b"a?"], "answers": [b"a"], "image": np.zeros((2, 2, 3), np.uint8)},
    )
    assert source[0] == from_questions(b"", ["a?"], ["a"])
    reasons = [
        "2 questions and 1 answers",
        "0 questions",
        "not UTF-8",
        "bytes stands",
        "list stands",
    ]
    reasons += ["NoneType stands", "image is of type ndarray"]
    for number, reason in enumerate(reasons, 1):
        with pytest.raises(BadRow, match=f"stored train row {number}: .*{reason}"):
            source[number]
    assert list(readable(source)) == [source[0]] and _texts([b"\xc3\xa9"]) == ["é"]
