"""Drawn pictures: the answers follow from what was drawn, rows from the seed, and the test split
shares neither fonts nor words with the other."""

import pickle
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import ImageDraw

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.config.data import DataConfig, SourceConfig
from infinitevl_jax.data.conversation import as_turns
from infinitevl_jax.data.drawing import recall, shapes
from infinitevl_jax.data.drawing.tasks import TASKS
from infinitevl_jax.data.mixture import open_mixture
from infinitevl_jax.data.sources import open_source
from infinitevl_jax.data.sources.apart import Apart

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def opened(task, split="train", **options):
    return open_source(SourceConfig(kind="drawn", options={"task": task, **options}), split)


@pytest.fixture
def written(monkeypatch):
    """Texts in the order in which they are drawn."""
    texts, text = [], ImageDraw.ImageDraw.text

    def note(self, place, words, *more, **options):
        texts.append(words)
        return text(self, place, words, *more, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return texts


@pytest.mark.parametrize("task", sorted(TASKS))
def test_rows_follow_from_the_seed(task):
    source = opened(task)
    again = pickle.loads(pickle.dumps(opened(task)))
    for number in (7, 3):
        one, two = as_turns(source[number]), as_turns(again[number])
        assert one[1:] == two[1:]
        for a, b in zip(one.pictures, two.pictures, strict=True):
            np.testing.assert_array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
            assert max(a["image"].size) <= 192
    scene, other = source.scene(3), opened(task, seed=1).scene(3)
    assert scene.turns != other.turns or scene.pictures[0] != other.pictures[0]
    slice_ = opened(task, "train[2:9]")
    assert len(slice_) == 7 and slice_.record(1) == 3
    assert slice_.scene(1).turns == scene.turns


def test_what_is_written_is_the_answer(written):
    for task in ("words", "lines"):
        source = opened(task)
        for number in range(30):
            written.clear()
            for question, answer in source.scene(number).turns:
                order = re.search("(first|second|third) line", question)
                if question.startswith("how many"):
                    assert answer == str(len(written))
                else:
                    line = ("first", "second", "third").index(order[1]) if order else 0
                    assert answer == written[line]


def test_totals_and_prices(written):
    source, totals = opened("receipts"), 0
    for number in range(60):
        written.clear()
        turns = dict(source.scene(number).turns)
        money = [text.removeprefix("$") for text in written if re.search(r"\.\d\d$", text)]
        for question, answer in turns.items():
            if question == "what is the total?":
                parts = [round(100 * float(text)) for text in money]
                assert answer == money[-1] and parts[-1] == sum(parts[:-1])
                totals += 1
            elif found := re.fullmatch(r"what does (\w+) cost\?", question):
                after = written[written.index(found[1]) + 1 :]
                assert answer == after[0].removeprefix("$")
    assert totals > 10


def test_values_of_charts(written):
    source, asked = opened("charts"), Counter()
    for number in range(60):
        written.clear()
        turns = source.scene(number).turns
        labels = [text for text in written if not text.isdigit()]
        values = [int(text) for text in written if text.isdigit()]
        bars = dict(zip(labels, values, strict=False))
        for question, answer in turns:
            asked[question.split()[0]] += 1
            if question == "how many bars are there?":
                assert answer == str(len(labels))
            elif found := re.fullmatch(r"what is the value of (\w+)\?", question):
                assert answer == str(bars[found[1]])
            elif found := re.fullmatch(r"is (\w+) more than (\w+)\?", question):
                if bars:
                    assert answer == ("yes" if bars[found[1]] > bars[found[2]] else "no")
            elif bars:
                best = max if "highest" in question else min
                assert answer == best(bars, key=bars.__getitem__)
    assert min(asked[word] for word in ("how", "what", "is", "which")) > 3


def test_shapes_are_counted(monkeypatch):
    drawn, draw_shape = [], shapes.draw_shape
    monkeypatch.setattr(
        shapes, "draw_shape", lambda *a: (drawn.append(a[1:]), draw_shape(*a)) and None
    )
    source = opened("shapes")
    for number in range(60):
        drawn.clear()
        image = source.scene(number).pictures[0]
        turns = source.scene(number).turns
        found = drawn[len(drawn) // 2 :]  # drawn twice
        for i, (_, x, y, radius, _) in enumerate(found):
            assert radius <= x <= image.width - radius and radius <= y <= image.height - radius
            for _, x2, y2, radius2, _ in found[:i]:
                assert max(abs(x - x2), abs(y - y2)) >= radius + radius2 - 1e-6
        kinds = Counter(kind for kind, *_ in found)
        for question, answer in turns:
            if question == "how many shapes are there?":
                assert answer == str(len(found))
            elif plain := re.fullmatch(r"how many (circle|rectangle|triangle)s .*", question):
                assert answer == str(kinds[plain[1]])
            elif two := re.fullmatch(r"are there more (\w+)s than (\w+)s\?", question):
                if two[1] in shapes.KINDS:
                    assert answer == ("yes" if kinds[two[1]] > kinds[two[2]] else "no")
            elif question == "what shape is the largest?":
                assert answer == max(found, key=lambda shape: shape[3])[0]


def test_the_card_was_shown_so_many_pictures_ago(monkeypatch):
    cards, card = [], recall._card
    monkeypatch.setattr(
        recall, "_card", lambda *a: cards.append((*a[3:], card(*a))) or cards[-1][-1]
    )
    for ago in (1, 5, 40):
        source = opened("recall", ago=ago)
        for number in range(10):
            cards.clear()
            pictures, ((question, answer),) = source.scene(number)
            colours = [colour for colour, *_ in cards]
            which = colours.index(re.search(r"on the (\w+) card", question)[1])
            assert len(pictures) == ago and pictures[-ago] is cards[which][2]
            assert answer == cards[which][1] and len(set(colours)) == len(colours)
    lengths = Counter(len(opened("recall", frames=9).scene(i).pictures) for i in range(200))
    assert max(lengths) <= 9 and len(lengths) > 6


def test_the_test_split_has_its_own_fonts_and_words(tmp_path):
    train, test = (opened("words", split).supplies for split in ("train", "test"))
    assert train.fonts.names and test.fonts.names
    assert not set(train.fonts.names) & set(test.fonts.names)
    rng = random.Random(0)
    own = [{supplies.words.word(rng) for _ in range(2000)} for supplies in (train, test)]
    assert not own[0] & own[1] and min(map(len, own)) > 300
    listed = ["apple", "pear", "plum", "fig", "cherry", "quince", "lime", "grape", "Melon", "kiwi"]
    (tmp_path / "words.txt").write_text("\n".join([*listed, "don't", "x", "1984"]))
    parts = [
        opened("words", split, words=str(tmp_path / "words.txt"), held_out=0.4).supplies.words
        for split in ("train", "test")
    ]
    found = [{part.word(rng) for _ in range(300)} for part in parts]
    assert not found[0] & found[1] and found[0] | found[1] == {w.lower() for w in listed}


def test_errors_say_what_to_do(tmp_path):
    def refused(text, split="train", **options):
        with pytest.raises(InfiniteVLError, match=text):
            opened(options.pop("task", "words"), split, **options)[0]

    refused("tasks: charts, lines", task="word")
    refused("only the task", ago=3)
    refused("options of this kind of source", font="x")
    refused("no folder", fonts=str(tmp_path / "none"))
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(r"has no .ttf", fonts=str(empty))
    refused(r"reads? test\[:90%\]", "test[7")
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(FONTS / "DejaVuSans.ttf", one)
    assert opened("words", fonts=str(one)).scene(0)
    refused("none is held out", "test", fonts=str(one))
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    shutil.copy(FONTS / "STIXNonUni.ttf", lacking)
    refused("lack characters", fonts=str(lacking))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "a.ttf").write_bytes(b"no font")
    refused("a.ttf cannot be read", fonts=str(damaged))
    words = tmp_path / "words.txt"
    words.write_bytes(b"\xff\xfe")
    refused("not UTF-8", words=str(words))
    words.write_text("1 2 3")
    refused("no words for the train", words=str(words))
    words.write_text("elephant " * 3 + "crocodile hippopotamus")
    refused("no 1 different ones of at most 10|no words", task="lines", words=str(words))


def test_questions_apart(tiny_data):
    """Each question is a row with its image, in the order of the data set."""
    config = {"name": "tiny_vqa", "folder": str(tiny_data)}
    whole = open_mixture(DataConfig(**config, questions=1))
    apart = open_mixture(DataConfig(**config, options={"apart": True}))
    turns = [as_turns(row) for row in whole.readable()]
    expected = [
        (t.image, [q], [a]) for t in turns for q, a in zip(t.questions, t.answers, strict=True)
    ]
    found = [as_turns(row) for row in apart.readable()]
    assert [(t.image, t.questions, t.answers) for t in found] == expected
    assert isinstance(apart.sources[""], Apart) and apart.place(3)[1] == 1
