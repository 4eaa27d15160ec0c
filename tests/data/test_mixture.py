"""Mixtures: which rows a run draws, in what order, and what is skipped of whom."""

from collections import Counter

import grain
import pytest
from own_data import byte_processor, encoder_of, learnt, write_rows
from tiny_folder import tiny_config

from infinitevl_jax.config.data import DataConfig, SourceConfig
from infinitevl_jax.config.presets import load_preset, to_tree
from infinitevl_jax.data.mixture import Mixture, Order, open_mixture
from infinitevl_jax.data.pipeline import skipping, train_batches
from infinitevl_jax.errors import InfiniteVLError

TOML = """\
[model]
from = "somewhere"

[train.data]
batch = 4

[train.data.sources.words]
path = "words.jsonl"
weight = 2

[train.data.sources.chats]
kind = "llava"
path = "chats.json"
images = "photos"
held_out = "train[:1]"
"""


class Numbers:
    """Rows that are their numbers."""

    def __init__(self, title, count):
        self.title, self.count = title, count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return self.title, number


def drawn(mixture, seed, start, stop):
    order = Order(mixture, seed)
    return [mixture[order[place]] for place in range(start, stop)]


def test_an_epoch_has_each_source_as_often_as_its_weight():
    sources = {"a": Numbers("a", 10), "b": Numbers("b", 4), "c": Numbers("c", 7)}
    mixture = Mixture(sources, {"a": 1.0, "b": 3.0, "c": 0.5})
    order = Order(mixture, 3)
    assert order.epoch == 10 + 12 + 4 and len(mixture) == 21
    for epoch in range(4):
        rows = drawn(mixture, 3, epoch * 26, (epoch + 1) * 26)
        counts = Counter(rows)
        assert Counter(title for title, _ in rows) == {"a": 10, "b": 12, "c": 4}
        assert {n for (t, _), n in counts.items() if t == "a"} == {1}
        assert {n for (t, _), n in counts.items() if t == "b"} == {3}
        assert rows != sorted(rows) and len({t for t, _ in rows[:8]}) > 1  # mixed
        so_far = Counter(row for row in drawn(mixture, 3, 0, (epoch + 1) * 26) if row[0] == "c")
        often = [so_far["c", i] for i in range(7)]
        assert max(often) - min(often) <= 1  # none comes again before all have come


def test_the_seed_decides():
    mixture = Mixture({"a": Numbers("a", 50), "b": Numbers("b", 50)})
    first, again, other = (drawn(mixture, seed, 0, 200) for seed in (1, 1, 2))
    assert first == again != other and first[:100] != first[100:]


def test_one_source_alone_is_shuffled_as_grain_does():
    order = Order(Mixture({"": Numbers("a", 23)}), 5)
    expected = grain.MapDataset.range(23).seed(5).shuffle()[0::1].repeat()
    assert [order[i] for i in range(70)] == [int(expected[i]) for i in range(70)]


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.toml").write_text(TOML)
    (tmp_path / "photos").mkdir()
    write_rows(tmp_path / "words.jsonl", [{"text": f"word {i}"} for i in range(6)])
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    bad = [{"from": "gpt", "value": "Hm"}]
    rows = [{"conversations": bad if i in (1, 3) else chat} for i in range(5)]
    write_rows(tmp_path / "chats.json", rows)
    return lambda *changes: load_preset("p.toml", changes)


def test_a_preset_names_them(preset):
    data = preset().train.data
    assert list(data.mixture) == ["chats", "words"]  # by name, whatever the order in the file
    mixture = open_mixture(data)
    assert mixture.sizes == {"chats": 5, "words": 6} and mixture.weights["words"] == 2
    assert open_mixture(data, held_out=True).sizes == {"chats": 1}
    changed = preset("train.data.sources.words.weight=3", "train.data.sources.words.path=w.json")
    assert changed.train.data.mixture["words"] == SourceConfig(path="w.json", weight=3.0)
    assert to_tree(changed)["train"]["data"]["sources"]["words"]["weight"] == 3.0
    one = preset("train.data.sources={}", "train.data.path=words.jsonl").train.data
    assert open_mixture(one).sizes == {"": 6}


def test_what_a_preset_must_not_say(preset):
    for change, culprit in (
        ("train.data.path=x.json", "gives path beside train.data.sources"),
        ("train.data.sources.words.wait=3", "train.data.sources.words.wait"),
        ("train.data.sources.words.weight=nan", "weight is nan"),
        ("train.data.sources.words=3", "train.data.sources.words"),
        ("train.data.sources=3", "train.data.sources is 3"),
    ):
        with pytest.raises(InfiniteVLError) as caught:
            preset(change)
        assert culprit in str(caught.value), caught.value
    data = preset("train.data.sources.words.options.blue=1").train.data
    with pytest.raises(InfiniteVLError, match="blue"):
        open_mixture(data)


def test_options_that_draw_no_questions_are_refused(tmp_path):
    path = write_rows(tmp_path / "rows.json", [{"question": "a?", "answer": "b"}])
    for options in ({}, {"balance": 0.0}, {"balance": 0.5, "opening_steps": 3}):
        data = {"path": str(path), "options": options}
        assert len(open_mixture(DataConfig(**data, questions=1))) == 1
        if not any(options.values()):
            assert len(open_mixture(DataConfig(**data))) == 1
            continue
        with pytest.raises(InfiniteVLError, match="gives opening_steps, balance, but") as caught:
            open_mixture(DataConfig(**data))
        assert "train.data.options={}" in caught.value.cure


def test_rows_are_skipped_by_source(preset, tmp_path):
    data = DataConfig(**vars(preset().train.data) | {"length": 64, "batch": 1})
    processor = byte_processor(tmp_path / "words")
    encoder = encoder_of(open_mixture(data), processor)
    skipped = skipping(encoder.dataset, data)
    batches = train_batches(encoder, tiny_config(), data, 0, skipped, 1)
    with pytest.raises(InfiniteVLError, match="at its end"):
        for _ in range(100):
            next(batches)
    batches.close()
    assert list(skipped.get_state()["chats.json"]) == ["1", "3"]
    assert [line[:25] for line in skipped.news()] == [
        "chats.json: skipped row 1",
        "chats.json: skipped row 3",
    ]
    assert learnt(encoder.conversation(10), processor) == "word 5<|endoftext|>"
