"""Rows that cannot be used: skipped by name up to a share, in an order that they do not change,
also after a resume."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tiny_run import write_preset

from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.data.conversation import as_turns, from_questions
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.pipeline import held_out_batches, train_batches
from infinitevl_jax.data.skipping import Skipped
from infinitevl_jax.data.sources.tfds import Dataset
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.train.setup import prepare_start


class Rows:
    """The rows of a source, some of them replaced."""

    name, split, title = "rows", "train", "rows train"

    def __init__(self, source, changed=None):
        self.source, self.changed = source, changed or {}

    def __len__(self):
        return len(self.source)

    def __getitem__(self, number):
        row = self.changed.get(number, self.source[number])
        if isinstance(row, Exception):
            raise row
        return row


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("run")
    preset = load_preset(write_preset(folder, tiny_data))
    source = Dataset("tiny_vqa", tiny_data, "train[:75%]")
    return preset.train.data, prepare_start(preset.model, source, folder, 0), source


def bad_rows(source):
    """A truncated picture, an answer that is too long, a record that cannot be read."""
    whole = as_turns(source[4])
    cut = from_questions(whole.image[:60], whole.questions, whole.answers)
    return {
        4: cut,
        9: from_questions(b"", ["is it red?"], ["red " * 90]),
        13: BadRow("rows train", 13, "it cannot be read", "prepare it again"),
    }


def take(made, changed, count, questions=2, batch=3, **changes):
    data, start, source = made
    data = dataclasses.replace(
        data, questions=questions, batch=batch, length=40, patches=64, **changes
    )
    skipped = Skipped(len(source), data.max_skipped)
    encoder = Encoder(Rows(source, changed), start.processor, start.config)
    batches = train_batches(encoder, start.config, data, 5, skipped)
    return batches, skipped, [next(batches) for _ in range(count)]


def questions_in_order(batches):
    """Targets of every branch, in the order that they come."""
    return [
        t[w > 0].tolist() + t.tolist()
        for batch in batches
        for t, w in zip(batch.targets, batch.weights, strict=True)
    ]


def test_the_others_keep_their_order(made):
    """Batches of 3 of 18 rows: without the bad ones the same questions come in each row of the
    batch, a little earlier."""
    _, _, whole = take(made, {}, 16)
    _, skipped, batches = take(made, bad_rows(made[2]), 10)
    assert sorted(skipped.reasons) == [4, 9, 13] and "prefix_length" not in str(skipped.reasons)
    missing = 0
    for lane in range(3):  # row of the batch
        every, left = (questions_in_order(b)[:] for b in (whole, batches))
        rows = [every[i : i + 2] for i in range(2 * lane, len(every), 6)]
        kept = iter([left[i : i + 2] for i in range(2 * lane, len(left), 6)])
        expected = next(kept)
        for row in rows:  # what is left is the whole without some rows
            if row == expected:
                expected = next(kept, None)
            elif expected is not None:
                missing += 1
        assert expected is None
    assert 4 <= missing <= 6  # each bad row twice, or behind the last batch


@pytest.mark.parametrize("questions", [2, 0], ids=["branches", "packed"])
@pytest.mark.parametrize("done", [1, 4])
def test_a_resume_skips_the_same_rows(made, questions, done):
    batches, skipped, _ = take(made, bad_rows(made[2]), done, questions)
    place = json.loads(json.dumps({"rows": batches.get_state(), "skipped": skipped.get_state()}))
    expected = [next(batches) for _ in range(6)]
    fresh, again, _ = take(made, bad_rows(made[2]), 0, questions)
    fresh.set_state(place["rows"])
    again.set_state(place["skipped"])
    assert again.news() == []  # told before
    found = [next(fresh) for _ in range(6)]
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.reasons == skipped.reasons


@pytest.mark.parametrize("questions", [2, 0], ids=["branches", "packed"])
def test_too_many_end_the_run_with_a_list(made, questions):
    broken = {i: BadRow("rows train", i, f"reason {i}", "mend the rows") for i in range(5, 12)}
    with pytest.raises(InfiniteVLError) as caught:
        take(made, broken, 12, questions)
    error = caught.value
    assert (
        error.culprit == "rows train: 4 of 18 rows cannot be used, 3 may be:"
        and len(error.items) == 4
    )
    assert all(
        item == f"row {item.split()[1][:-1]}: reason {item.split()[1][:-1]}" for item in error.items
    )
    assert error.cure == "mend the rows; or let more be skipped: train.data.max_skipped=0.444444"
    _, skipped, _ = take(made, broken, 12, questions, max_skipped=0.444444)  # the cure works
    assert sorted(skipped.reasons) == list(range(5, 12))


def test_a_source_that_calls_itself_otherwise(made):
    broken = {13: BadRow("elsewhere", 13, "gone", "mend it")}
    _, skipped, _ = take(made, broken, 12)
    assert skipped.reasons == {13: "gone"}


def test_none_may_be_skipped(made):
    with pytest.raises(BadRow, match="rows train row 13: it cannot be read"):
        take(made, {13: bad_rows(made[2])[13]}, 6, max_skipped=0.0)


@pytest.mark.parametrize("questions", [2, 0], ids=["branches", "packed"])
def test_all_rows_bad_is_an_end(made, questions):
    broken = {i: BadRow("rows train", i, "gone", "mend the rows") for i in range(18)}
    with pytest.raises(InfiniteVLError, match="18 of 18 rows cannot be used, 17 may be"):
        take(made, broken, 1, questions, max_skipped=1.0)


@pytest.mark.parametrize("questions", [2, 0], ids=["branches", "packed"])
def test_held_out_rows_are_skipped_alike(made, questions):
    data, start, source = made
    data = dataclasses.replace(data, questions=questions, batch=3, length=40, patches=64)

    def measure(changed, **changes):
        skipped = Skipped(len(source), dataclasses.replace(data, **changes).max_skipped)
        encoder = Encoder(Rows(source, changed), start.processor, start.config)
        batches = list(
            held_out_batches(encoder, start.config, dataclasses.replace(data, **changes), skipped)
        )
        return sum(int((b.weights > 0).sum()) for b in batches), skipped.news()

    whole, none = measure({})
    less, news = measure(bad_rows(source))
    answers = sum(
        2 * len(as_turns(source[i]).questions) for i in (4, 9, 13)
    )  # a word and the end of turn each
    assert none == [] and whole - less == answers
    assert [line.split(":")[0] for line in news] == [
        "skipped row 4",
        "skipped row 9",
        "skipped row 13",
    ]
    with pytest.raises(InfiniteVLError, match="cannot be used, 3 may be"):
        measure(
            {i: bad_rows(source)[13] for i in ()}
            | {i: BadRow("rows train", i, "gone", "mend") for i in range(4)}
        )


def test_how_many_may_be():
    assert [
        Skipped(rows, share).limit
        for rows, share in (
            (10_000, 0.01),
            (50, 0.01),
            (2, 0.01),
            (1, 0.5),
            (10, 1.0),
            (10_000, 0.0),
        )
    ] == [
        100,
        3,
        1,
        0,
        9,
        0,
    ]
    skipped = Skipped(10, 0.5)
    for _ in range(9):  # one row, met in every epoch
        skipped.add(BadRow("rows", 3, "gone", "mend"))
    assert skipped.news() == ["skipped row 3: gone"] and skipped.news() == []
