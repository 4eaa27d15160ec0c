"""Conversations that a tiny model writes by itself."""

import dataclasses
import json
import sys

import pytest
from tiny_folder import full_attention_config, tiny_model, write_folder

from benchmarks.training import sample
from infinitevl_jax import InfiniteVL, Processor
from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.config.model import FULL
from infinitevl_jax.data.mixture import open_mixture

TOKENS = {"question": 8, "answer": 12}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    config = full_attention_config()
    text = dataclasses.replace(config.text, layer_types=(FULL,))
    return write_folder(folder / "teacher", tiny_model(dataclasses.replace(config, text=text)))


@pytest.fixture(scope="module")
def sampler(teacher):
    sampler = sample.Sampler(
        InfiniteVL.from_pretrained(teacher),
        Processor.from_pretrained(teacher),
        seed=3,
        question_tokens=TOKENS["question"],
        answer_tokens=TOKENS["answer"],
        slots=4,
    )
    sampler.ends = [*sampler.ends, ord("n"), ord("d")]  # its own ends it hardly ever says
    return sampler


def test_it_opens_where_a_user_speaks(sampler):
    said = sampler.processor.decode(sampler.opening, skip_special_tokens=False)
    assert said.endswith("<|im_start|>user\n") and "QUESTION" not in said


def test_each_conversation_is_what_the_model_says_alone(sampler):
    """First the question, then the answer to it, drawn with seeds of their own."""
    processor = sampler.processor
    stream = sampler.conversations(0)
    found = [next(stream) for _ in range(10)]
    assert [number for number, _ in found] == list(range(10))
    kept = 0
    for number, messages in found:
        text, ids = "", sampler.opening[None]
        for turn, most in enumerate(TOKENS.values()):
            said = sampler.engine.submit(
                ids,
                max_new_tokens=most,
                temperature=1.0,
                seed=sampler.token_seed(number, turn),
                eos_token_ids=sampler.ends,
            ).result()
            text = processor.decode(said[:-1]).strip()
            whole = processor.decode(said[:-1], skip_special_tokens=False).strip()
            if said[-1] not in sampler.ends or not text or text != whole:
                text = ""
                break
            if messages is not None:
                assert messages[turn]["content"] == text
            ids = processor([{"role": "user", "content": text}])["input_ids"]
        assert (messages is None) == (not text)
        kept += messages is not None
    assert 0 < kept < 10  # of both kinds


def test_a_stopped_file_goes_on_to_the_same_lines(sampler, tmp_path):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts" / "some.jsonl"
    found = sample.sample(sampler, whole, 4)
    assert found["written"] == 4
    sample.sample(sampler, parts, 2)
    with parts.open("a") as file:
        file.write('{"number": 99, "mess')  # killed meanwhile
    assert sample.sample(sampler, parts, 4)["written"] == 2
    assert parts.read_bytes() == whole.read_bytes()
    rows = open_mixture(DataConfig(path=str(whole)))
    assert [row.messages for row in map(rows.__getitem__, range(4))] == [
        json.loads(line)["messages"] for line in whole.read_text().splitlines()
    ]


def test_a_question_comes_once(sampler, tmp_path, monkeypatch):
    def repeating(first):
        for number in range(first, 10):
            said = [f"question {number // 3}", f"answer {number}"]
            roles = ("user", "assistant")
            yield sample.Sampled(
                number, [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]
            )

    monkeypatch.setattr(sampler, "conversations", repeating)
    found = sample.sample(sampler, tmp_path / "some.jsonl", 3)
    assert found == {"written": 3, "unfinished": 0, "repeated": 4}


def test_the_program(teacher, tmp_path, monkeypatch, capsys):
    words = [str(teacher), str(tmp_path / "some.jsonl"), "--conversations=0", "--dtype=float32"]
    monkeypatch.setattr(sys, "argv", ["sample", *words])
    sample.main()
    assert "'written': 0" in capsys.readouterr().out
