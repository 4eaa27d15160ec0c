"""Answers on branches equal questions asked alone; scores; the blind baseline."""

import numpy as np
import pytest
from tiny_run import write_preset

from infinitevl_jax import InfiniteVL
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.data.conversation import Turns, as_turns
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.sources.tfds import Dataset
from infinitevl_jax.eval.picture import draw_samples
from infinitevl_jax.eval.vqa import answer_blind, answer_split, score
from infinitevl_jax.train.setup import prepare_start


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    folder = tmp_path_factory.mktemp("run")
    preset = load_preset(write_preset(folder, tiny_data))
    source = Dataset("tiny_vqa", tiny_data, "train[75%:]")
    start = prepare_start(preset.model, source, folder, 0)
    model = InfiniteVL.random(start.config, 5)
    # an untrained model repeats the last token, a special one: bias it towards words
    special = start.processor.tokenizer.token_id("<|endoftext|>")
    params = dict(model.params)
    embedding = params["embed_tokens.embedding"].at[special:].multiply(1e-2)
    model = InfiniteVL(model.config, params | {"embed_tokens.embedding": embedding})
    return model, start, source


def test_every_question_is_answered_as_if_alone(made):
    model, start, source = made
    answers = answer_split(
        model, start.processor, Encoder(source, start.processor, start.config), images=4, branches=7
    )
    assert [len(a) for a in answers] == [
        len(as_turns(source[i]).questions) for i in range(len(source))
    ]
    for i in range(len(source)):
        row = as_turns(source[i])
        for question, answer in zip(row.questions, answers[i], strict=True):
            content = [{"type": "image", "image": row.image}, {"type": "text", "text": question}]
            alone = model.generate(
                **start.processor([{"role": "user", "content": content}]), max_new_tokens=4
            )
            assert start.processor.decode(alone[0]).strip() == answer
    assert len({a for row in answers for a in row}) > 1


def test_scores_and_the_blind_baseline():
    train = [
        Turns([], ["color?", "is it red?"], ["red", "yes"]),
        Turns([], ["color?", "is it red?"], ["blue", "no"]),
    ]
    train += [Turns([], ["is it red?"], ["no"]), Turns([], ["shade?"], ["blue"])]
    test = [Turns([], ["color?", "is it red?"], ["blue", "yes"]), Turns([], ["new?"], ["no"])]
    blind = answer_blind(train, test)
    assert blind == [
        ["blue", "no"],
        ["blue"],
    ]  # equal counts: the answer that is commoner overall; unknown question: the commonest
    result = score(test, blind)
    assert (result.right, result.questions, result.right_other, result.questions_other) == (
        1,
        3,
        1,
        1,
    )
    assert result.all == pytest.approx(1 / 3) and result.other == 1


def test_picture(tmp_path, made):
    source = made[2]
    draw_samples([(as_turns(source[i]), 0, "red") for i in range(6)], tmp_path / "samples.png")
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["samples.png"]


def test_the_official_split_and_its_blind_baseline(tmp_path):
    """Known sizes. The blind baseline is 67.0 % of all questions, 23.3 % without yes/no."""
    train, test = (Dataset("easy_vqa", tmp_path, split) for split in ("train", "test"))
    train, test = ([as_turns(row) for row in source] for source in (train, test))
    assert (len(train), len(test)) == (4000, 1000)
    assert sum(len(r.questions) for r in train) == 38575
    blind = score(test, answer_blind(train, test))
    assert (blind.questions, blind.questions_other) == (9673, 2537)
    assert (round(blind.all, 3), round(blind.other, 3)) == (0.670, 0.233)
    held = Dataset("easy_vqa", tmp_path, "train[90%:]")
    kept = Dataset("easy_vqa", tmp_path, "train[:90%]")
    assert not {as_turns(row).image for row in held} & {
        as_turns(row).image for row in kept
    } or _twins(train)
    assert len(held) + len(kept) == 4000


def _twins(rows):
    """Whether images repeat in a split, so that a split by row cannot separate them."""
    return len({r.image for r in rows}) < len(rows)


def test_answers_pad_to_one_shape(made):
    model, start, source = made
    encoder = Encoder(source, start.processor, start.config)
    small = answer_split(model, start.processor, encoder, images=2, branches=3)
    large = answer_split(model, start.processor, encoder, images=6, branches=32)
    assert small == large
    assert np.asarray([len(a) for a in small]).sum() == sum(
        len(as_turns(source[i]).questions) for i in range(len(source))
    )
