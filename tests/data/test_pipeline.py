"""Rows to batches: what is asked, in what order, and how it is laid out."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import write_preset

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.data.collate import group_questions
from infinitevl_jax.data.conversation import as_turns
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.pipeline import blank_batch, held_out_batches, train_batches
from infinitevl_jax.data.sources import open_source
from infinitevl_jax.data.sources.tfds import Dataset
from infinitevl_jax.train.setup import prepare_start

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("run")
    preset = load_preset(write_preset(folder, tiny_data))
    source = Dataset("tiny_vqa", tiny_data, "train[:75%]")
    start = prepare_start(preset.model, source, folder, 0)
    return preset.train.data, start, Encoder(source, start.processor, start.config)


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def ask(start, source, row, question):
    """What the processor makes of an image and a question."""
    content = [
        {"type": "image", "image": as_turns(source[row]).image},
        {"type": "text", "text": as_turns(source[row]).questions[question]},
    ]
    return start.processor([{"role": "user", "content": content}])["input_ids"][0]


def test_prefix_and_branch_are_the_processor_s_prompt(made):
    _, start, encoder = made
    for number in range(len(encoder)):
        row = encoder[number]
        for i, branch in enumerate(row.branches):
            whole = np.concatenate([row.prefix.tokens, branch.tokens])
            prompt = ask(start, encoder.dataset, number, i)
            np.testing.assert_array_equal(whole[: len(prompt)], prompt)
            answer = whole[len(prompt) :]
            assert start.processor.decode(answer) == as_turns(encoder.dataset[number]).answers[i]
            assert answer[-1] == start.config.eos_token_ids[0]
            np.testing.assert_array_equal(
                branch.answer, np.arange(len(branch.tokens)) >= len(prompt) - len(row.prefix.tokens)
            )


def test_a_batch_asks_each_image_its_own_questions(made):
    data, start, encoder = made
    batch = next(train_batches(encoder, start.config, data, seed=3))
    assert batch.prefix.tokens.shape == (8, 6) and batch.branches.tokens.shape == (16, 10)
    np.testing.assert_array_equal(batch.parents, np.repeat(np.arange(8), 2))
    rows = {encoder[i].prefix.pixels.tobytes(): encoder[i] for i in range(len(encoder))}
    for i in range(16):
        used = batch.patches.patch_index[batch.parents[i]] >= 0
        patches = np.sort(batch.patches.pixels[batch.parents[i]][used], axis=0)
        row = next(
            r for r in rows.values() if np.array_equal(np.sort(r.prefix.pixels, axis=0), patches)
        )
        size = int((batch.branches.token_index[i] >= 0).sum())
        tokens = np.append(batch.branches.tokens[i][:size], batch.targets[i][size - 1])
        assert any(np.array_equal(tokens, b.tokens) for b in row.branches)
        answered = batch.targets[i][batch.weights[i] > 0]
        assert answered[-1] == start.config.eos_token_ids[0] and len(answered) == 2


def test_order_is_decided_by_seed_and_epoch(made):
    data, start, encoder = made
    data = dataclasses.replace(data, batch=6)

    def take(seed, count):
        batches = train_batches(encoder, start.config, data, seed)
        return [next(batches) for _ in range(count)]

    first, again, other = take(1, 6), take(1, 6), take(2, 1)
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not same(first[0], other[0])
    epochs = [np.concatenate([b.patches.pixels for b in first[i : i + 3]]) for i in (0, 3)]
    assert not np.array_equal(*epochs)  # another order ...
    bags = [sorted(image.tobytes() for image in epoch) for epoch in epochs]
    assert bags[0] == bags[1] and len(set(bags[0])) == 18  # ... of the same images, each once


@pytest.mark.parametrize("questions", [2, 0])
def test_place_can_be_saved_and_found_again(made, questions):
    data, start, encoder = made
    data = dataclasses.replace(data, questions=questions, length=40, patches=64, batch=3)
    batches = train_batches(encoder, start.config, data, 0)
    for _ in range(7):
        next(batches)
    place = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(3)]
    fresh = train_batches(encoder, start.config, data, 0)
    fresh.set_state(place)
    assert all(same(next(fresh), batch) for batch in expected)


def test_held_out_asks_everything_once(made):
    data, start, encoder = made
    asked = sum(
        int((b.weights.sum(1) > 0).sum()) for b in held_out_batches(encoder, start.config, data)
    )
    assert asked == sum(len(encoder[i].branches) for i in range(len(encoder)))


def test_groups_hold_every_question_once():
    groups = list(group_questions([3, 0, 5, 1, 9], images=2, branches=4))
    assert all(len(g) <= 2 and sum(len(w) for _, w in g) <= 4 for g in groups)
    assert [(r, q) for g in groups for r, w in g for q in w] == [
        (r, q) for r, n in enumerate([3, 0, 5, 1, 9]) for q in range(n)
    ]


def rows_of(batch, lanes, of):
    """The part of a global batch that belongs to these of its `of` rows."""

    def cut(x, axis=0):
        width = x.shape[axis] // of
        return np.take(x, range(lanes.start * width, lanes.stop * width), axis)

    branches = batch.branches
    return jax.tree.map(cut, (batch.patches, batch.prefix and batch.prefix.tokens)) + (
        jax.tree.map(cut, branches._replace(positions=None)),
        None if branches.positions is None else cut(branches.positions, 1),
        cut(batch.targets),
        cut(batch.weights),
    )


@pytest.mark.parametrize("questions", [2, 0], ids=["branches", "packed"])
@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_the_global_batch(made, questions, processes):
    """The parts of all processes are the batches of one process, and its places are theirs."""
    data, start, encoder = made
    data = dataclasses.replace(data, batch=6, questions=questions, length=40, patches=64)
    whole = train_batches(encoder, start.config, data, 0)
    expected = [next(whole) for _ in range(5)]
    lanes = {}
    for process in range(processes):
        mine = range(process * 6 // processes, (process + 1) * 6 // processes)
        batches = train_batches(encoder, start.config, data, 0, rows=mine)
        for batch in expected:
            part = rows_of(next(batches), range(len(mine)), len(mine))
            assert same(part, rows_of(batch, mine, 6))
        lanes |= batches.get_state()["lanes"]
    assert lanes == whole.get_state()["lanes"]


@pytest.mark.parametrize("questions", [2, 0], ids=["branches", "packed"])
def test_processes_share_the_held_out_split(made, questions):
    """Each has its part, and together they have all questions."""
    data, start, encoder = made
    data = dataclasses.replace(data, batch=6, questions=questions, length=40, patches=64)

    def tokens(rows):
        batches = list(held_out_batches(encoder, start.config, data, rows=rows))
        assert all(len(b.targets) == len(rows) * max(1, questions) for b in batches)
        return sum(float(b.weights.sum()) for b in batches)

    parts = [tokens(rows) for rows in ((0, 1), (2, 5), (3, 4))]
    assert all(parts) and sum(parts) == tokens(range(6))
    blank = blank_batch(start.config, data, 2)
    assert not blank.weights.any() and (blank.branches.token_index == -1).all()
    part = next(held_out_batches(encoder, start.config, data, rows=(0, 1)))
    assert jax.tree.map(np.shape, part) == jax.tree.map(np.shape, blank)


def drawing(made, folder, **options):
    """An encoder of the same rows, whose questions are drawn by these options."""
    _, start, _ = made
    source = SourceConfig(name="tiny_vqa", folder=str(folder), options=options)
    return Encoder(open_source(source, "train[:75%]"), start.processor, start.config)


def test_balance_draws_a_question_s_rare_answers_more_often(made, tiny_data):
    data, start, encoder = made
    turns = Counter(
        turn
        for i in range(len(encoder))
        for row in [as_turns(encoder.dataset[i])]
        for turn in zip(row.questions, row.answers, strict=True)
    )
    question = next(q for (q, a) in turns if a == "yes" and turns[q, "no"] > turns[q, "yes"])
    asked = start.processor.tokenizer.encode(question)
    ids = [start.processor.tokenizer.token_id(answer) for answer in ("yes", "no")]

    def ratio(balance):
        """How often that question was drawn where the answer is yes, over where it is no."""
        batches = train_batches(
            drawing(made, tiny_data, balance=balance),
            start.config,
            dataclasses.replace(data, batch=9, questions=1),
            0,
        )
        drawn = Counter()
        for batch in (next(batches) for _ in range(60)):
            for tokens, targets, weights in zip(
                batch.branches.tokens, batch.targets, batch.weights, strict=True
            ):
                if list(tokens[: len(asked)]) == list(asked):
                    drawn[int(targets[weights > 0][0])] += 1
        return drawn[ids[0]] / drawn[ids[1]]

    assert ratio(1.0) > 1.3 * ratio(0.0)


def test_opening_asks_one_kind_of_question_first(made, tiny_data):
    data, start, _ = made
    data = dataclasses.replace(data, batch=6)
    encoder = drawing(made, tiny_data, opening="^is it", opening_steps=2)
    batches = train_batches(encoder, start.config, data, 0)
    first = start.processor.tokenizer.token_id("is")
    asks = [(next(batches).branches.tokens[:, 0] == first).mean() for _ in range(5)]
    assert asks[:2] == [1, 1] and max(asks[2:]) < 1


def test_a_script_named_like_the_package_is_no_hindrance(tmp_path):
    """A script of the same name stands first on the path, and must not be taken for the package."""
    script = tmp_path / "easy_vqa.py"
    script.write_text(
        f"import sys; sys.path.append({str(ROOT)!r})\nfrom infinitevl_jax.data.sources.tfds import"
        f" Dataset\nprint(len(Dataset('easy_vqa', {str(tmp_path / 'data')!r}, 'test')))\n"
    )
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert out.stdout.strip() == "1000", out.stderr
