"""What `generate` is asked for: Hugging Face's words, the checkpoint's own settings, stop strings,
streamers; what is refused."""

import json

import jax
import numpy as np
import pytest
import torch
from tiny_folder import (
    IDS,
    full_attention_config,
    tiny_config,
    tiny_model,
    write_folder,
    write_tokenizer,
)
from transformers import GenerationConfig, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from infinitevl_jax import InfiniteVL, InfiniteVLError, InfiniteVLWarning, Processor, Sampling
from infinitevl_jax.serve.generation import Defaults, read_defaults, resolve
from infinitevl_jax.serve.sampling import Settings, choose

IDS_IN = np.array([[104, 105, 106]])
NEVER = {"eos_token_ids": []}


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    write_tokenizer(folder)
    return Processor.from_pretrained(folder)


@pytest.fixture(scope="module")
def greedy(model):
    return model.generate(IDS_IN, max_new_tokens=8, **NEVER)


def asked(defaults=Defaults(), width=3, **arguments):  # noqa: B008  frozen
    return resolve(arguments, defaults, tiny_config(), width)


OWN = Defaults(1.05, {"temperature": 0.7, "top_k": 20, "top_p": 0.8}, {"max_new_tokens": 2048})


@pytest.mark.parametrize(
    ("arguments", "defaults", "expected"),
    [
        ({}, Defaults(), Sampling()),
        ({}, OWN, Sampling(repetition_penalty=1.05)),
        ({"do_sample": True}, Defaults(), Sampling(1.0, 50, 1.0)),
        ({"do_sample": True}, OWN, Sampling(0.7, 20, 0.8, repetition_penalty=1.05)),
        ({"do_sample": True, "top_k": 5}, OWN, Sampling(0.7, 5, 0.8, repetition_penalty=1.05)),
        ({"temperature": 0.5}, Defaults(), Sampling(0.5, 50, 1.0)),
        ({"temperature": 0.5, "top_k": 0, "min_p": 0.1}, Defaults(), Sampling(0.5, 0, 1.0, 0.1)),
        ({"top_p": 0.9}, OWN, Sampling(0.7, 20, 0.9, repetition_penalty=1.05)),
        ({"temperature": 0}, OWN, Sampling(repetition_penalty=1.05)),
        ({"do_sample": False, "temperature": 0.7}, OWN, Sampling(repetition_penalty=1.05)),
        (
            {"do_sample": False, "temperature": None, "top_p": None},
            OWN,
            Sampling(repetition_penalty=1.05),
        ),
        ({"repetition_penalty": 1.0}, OWN, Sampling()),
        ({"repetition_penalty": np.float32(1.5)}, OWN, Sampling(repetition_penalty=1.5)),
        ({"sampling": Sampling(2.0)}, OWN, Sampling(2.0)),
    ],
)
def test_how_tokens_are_chosen(arguments, defaults, expected):
    assert asked(defaults, **arguments).sampling == expected


def test_how_many_tokens_and_what_ends_them():
    assert asked().max_new_tokens == 256 and asked(OWN).max_new_tokens == 2048
    assert (
        asked(OWN, max_length=10).max_new_tokens == 7
        and asked(max_length=10, max_new_tokens=4).max_new_tokens == 4
    )
    assert (
        asked(Defaults(lengths={"max_length": 20}), width=50).max_new_tokens == 1
    )  # transformers' own would make none
    assert (
        asked().ends == (256,)
        and asked(eos_token_id=5).ends == (5,)
        and asked(eos_token_ids=torch.tensor([5, 6])).ends == (5, 6)
    )
    assert asked(eos_token_ids=[]).ends == () and asked(pad_token_id=7).pad == 7
    same = {
        "num_beams": 1,
        "use_cache": True,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
        "logits_processor": [],
    }
    assert (
        asked(
            **same,
            no_repeat_ngram_size=0,
            stopping_criteria=None,
            synced_gpus=False,
            length_penalty=1.0,
        )
        == asked()
    )


REFUSED = {
    "num_beams": (4, "no beam search"),
    "use_cache": (False, "leave use_cache out"),
    "num_return_sequences": (3, "repeat the row"),
    "no_repeat_ngram_size": (2, "use repetition_penalty"),
    "return_dict_in_generate": (True, r"call model\(...\)"),
    "logits_processor": ([print], r"model.stream"),
    "stopping_criteria": ([print], "stop listening"),
    "generation_config": (object(), "as arguments"),
    "past_key_values": ((), "Conversation"),
    "bad_words_ids": ([[5]], "model.stream"),
    "max_new_token": (5, "max_new_tokens"),
    "sampler": (5, "did you mean|it takes"),
    "max_new_tokens": (-1, "max_new_tokens is -1"),
    "max_length": (3, "the prompt alone has 3"),
    "temperature": (float("nan"), "temperature is nan"),
    "top_k": (2.5, "top_k is 2.5"),
    "top_p": (0, "0 < top_p <= 1"),
    "min_p": (1.5, "0 <= min_p <= 1"),
    "repetition_penalty": (0, "repetition_penalty is 0"),
    "do_sample": ("yes", "True or False"),
    "seed": (-1, "seed is -1"),
    "eos_token_ids": (["<|im_end|>"], "eos_token_ids has dtype"),
    "eos_token_id": (1.5, "eos_token_id has shape"),
    "pad_token_id": (10**6, "pad_token_id is 1000000"),
    "sampling": ("greedy", r"Sampling\(temperature"),
    "stop_strings": (["a", ""], "none of them empty"),
    "streamer": (print, "put"),
    "steps": (4, "no argument"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name, model):
    value, said = REFUSED[name]
    with pytest.raises(InfiniteVLError, match=said) as error:
        model.generate(IDS_IN, **{name: value})
    assert name in error.value.culprit


@pytest.mark.parametrize("value", [1.5, "8", True, 2**31, -3, np.float32(2)], ids=repr)
def test_numbers_of_new_tokens_are_whole(value, model):
    with pytest.raises(InfiniteVLError, match="max_new_tokens is "):
        model.stream(IDS_IN, max_new_tokens=value)  # at once, not with the first token


@pytest.mark.parametrize(
    "arguments", [{"stop_strings": "a"}, {"sampling": Sampling(1.0), "top_k": 5}], ids=str
)
def test_what_does_not_go_together(arguments, model):
    with pytest.raises(InfiniteVLError, match="without a tokenizer|came together"):
        model.generate(IDS_IN, **arguments)


def test_a_penalty_is_that_of_transformers():
    rng = np.random.default_rng(0)
    logits, held = rng.normal(size=(3, 50)).astype(np.float32), rng.integers(0, 50, (3, 12))
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor(held), torch.tensor(logits)).numpy()
    occurred = np.zeros((3, 50), bool)
    occurred[np.arange(3)[:, None], held] = True
    tokens = choose_with(Sampling(repetition_penalty=1.7), logits, occurred)
    assert tokens.tolist() == theirs.argmax(-1).tolist() != logits.argmax(-1).tolist()


@pytest.mark.parametrize("least", [0.05, 0.3, 1.0])
def test_min_p_keeps_what_transformers_keeps(least):
    logits = np.random.default_rng(1).normal(scale=2, size=(1, 20)).astype(np.float32)
    kept = np.isfinite(MinPLogitsWarper(least)(None, torch.tensor(logits / 1.5)).numpy()[0])
    draws = choose_with(Sampling(1.5, min_p=least), np.tile(logits, (20_000, 1)))
    assert set(np.unique(draws)) == set(np.flatnonzero(kept))


def test_generate_applies_a_penalty_to_prompt_and_answer(model):
    """Against repeated full calls."""
    ids, penalty = IDS_IN, 1.4
    for _ in range(6):
        logits = np.array(model(ids).logits)[:, -1]
        held = np.unique(ids)
        logits[:, held] = np.where(
            logits[:, held] < 0, logits[:, held] * penalty, logits[:, held] / penalty
        )
        ids = np.concatenate([ids, logits.argmax(-1)[:, None]], 1)
    made = model.generate(IDS_IN, max_new_tokens=6, repetition_penalty=penalty, **NEVER)
    np.testing.assert_array_equal(made, ids[:, 3:])
    assert made.tolist() != model.generate(IDS_IN, max_new_tokens=6, **NEVER).tolist()


def choose_with(sampling, logits, occurred=None):
    """One token of each row of logits, drawn with seed 0."""
    rows = len(logits)
    seed = np.stack([np.zeros(rows, np.uint32), np.arange(rows, dtype=np.uint32)], 1)
    occurred = np.zeros(logits.shape, bool) if occurred is None else occurred
    settings = Settings.of([sampling] * rows)
    return np.asarray(jax.jit(choose)(logits, seed, np.zeros(rows, np.int32), settings, occurred))


def write_settings(folder, **settings):
    (folder / "generation_config.json").write_text(json.dumps(settings))


def test_a_published_penalty_is_applied(model, tmp_path):
    """As Qwen2.5-VL has it: sampling so cold that it is greedy, and a penalty."""
    folder = write_folder(tmp_path / "m", model)
    write_settings(
        folder,
        do_sample=True,
        temperature=1e-6,
        repetition_penalty=1.4,
        eos_token_id=[258, 256],
        bos_token_id=1,
    )
    loaded = InfiniteVL.from_pretrained(folder)
    np.testing.assert_array_equal(
        loaded.generate(IDS_IN, max_new_tokens=6, **NEVER),
        model.generate(IDS_IN, max_new_tokens=6, repetition_penalty=1.4, **NEVER),
    )
    assert (
        loaded.generate(IDS_IN, max_new_tokens=6, repetition_penalty=1.0, **NEVER).tolist()
        == model.generate(IDS_IN, max_new_tokens=6, **NEVER).tolist()
    )


ASIDE = {
    "no_repeat_ngram_size": 2,
    "num_beams": 4,
    "suppress_tokens": [5],
    "min_new_tokens": 3,
    "do_sample": True,
    "typical_p": 0.9,
    "a_setting_of_tomorrow": 1,
    "stop_strings": ["x"],
    "bad_words_ids": [[5]],
    "penalty_alpha": 0.6,
}


@pytest.mark.parametrize("name", ASIDE)
def test_a_setting_that_is_not_applied_is_named_in_one_line(name, tmp_path):
    write_settings(tmp_path, **{name: ASIDE[name], "temperature": 0.7, "top_k": 20})
    with pytest.warns(
        InfiniteVLWarning, match=f"generation_config.json: not applied: .*{name}"
    ) as said:
        defaults = read_defaults(tmp_path)
    assert (
        len(said) == 1
        and "\n" not in str(said[0].message)
        and defaults.warpers == {"temperature": 0.7, "top_k": 20}
    )


def test_settings_that_change_nothing_are_not_mentioned(tmp_path):
    GenerationConfig(
        eos_token_id=5, no_repeat_ngram_size=0, num_beams=1, use_cache=True, length_penalty=1.0
    ).save_pretrained(tmp_path)
    assert read_defaults(tmp_path) == Defaults()
    assert read_defaults(tmp_path / "nowhere") == Defaults()


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": "1.05"}, {"temperature": -1}, {"top_k": 1.5}, {"max_new_tokens": 0}],
    ids=str,
)
def test_settings_out_of_range_name_the_file(settings, tmp_path):
    write_settings(tmp_path, **settings)
    with pytest.raises(InfiniteVLError, match=rf"generation_config.json: .*{next(iter(settings))}"):
        read_defaults(tmp_path)


def test_stop_strings_end_each_sequence_by_itself(model, processor, greedy):
    """Across tokens; the text is kept, pads follow, and the other row goes on."""
    other = np.array([[120, 121, 122]])
    both = np.concatenate([IDS_IN, other])
    free = model.generate(both, max_new_tokens=8, **NEVER)
    stop = processor.decode(free[0, 2:4])
    assert free[0].tolist() == greedy[0].tolist() and stop not in processor.decode(free[1])
    made = model.generate(
        both, max_new_tokens=8, stop_strings=[stop, "never said"], tokenizer=processor, **NEVER
    )
    assert (
        made[0].tolist() == [*free[0, :4], *[model.config.pad_token_id] * 4]
        and made[1].tolist() == free[1].tolist()
    )
    alone = model.generate(
        IDS_IN,
        max_new_tokens=8,
        stop_strings=stop,
        tokenizer=processor.tokenizer,
        pad_token_id=3,
        **NEVER,
    )
    assert alone.tolist() == free[:1, :4].tolist()


def test_stop_strings_see_special_tokens(model, processor):
    ended = model.generate(
        IDS_IN,
        max_new_tokens=64,
        stop_strings="<|im_end|>",
        tokenizer=processor,
        seed=1,
        temperature=2.0,
        **NEVER,
    )
    assert IDS["<|im_end|>"] not in ended[0, :-1] and (
        ended.shape[1] == 64 or ended[0, -1] == IDS["<|im_end|>"]
    )


def test_a_streamer_gets_the_prompt_the_steps_and_the_end(model, greedy):
    class Streamer:
        def __init__(self):
            self.got = []

        def put(self, ids):
            self.got.append(ids.tolist())

        def end(self):
            self.got.append("end")

    streamer = Streamer()
    model.generate(IDS_IN, max_new_tokens=4, streamer=streamer, **NEVER)
    assert streamer.got == [IDS_IN.tolist(), *[[token] for token in greedy[0, :4].tolist()], "end"]


def test_logits_to_keep(model):
    """The last columns, of padded rows as well, at any width."""
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = np.array([[0, 0, 104, 105, 106], [101, 102, 103, 104, 105]])
    whole = np.asarray(model(ids, mask).logits)
    for kept in (1, 2, 99):
        last = np.asarray(model(ids, mask, logits_to_keep=kept).logits)
        assert last.shape == (2, min(kept, 5), 272)
        valid = mask[:, -kept:] > 0
        np.testing.assert_allclose(last[valid], whole[:, -kept:][valid], rtol=1e-5, atol=1e-5)
    with pytest.raises(InfiniteVLError, match="logits_to_keep is -1"):
        model(ids, logits_to_keep=-1)


CALLS = {
    "labels": ({"labels": IDS_IN}, "labels.*\n  -> compute the loss"),
    "past_key_values": ({"past_key_values": ()}, "pass cache="),
    "output_attentions": ({"output_attentions": True}, "never formed"),
    "an unknown word": ({"imput_ids": IDS_IN}, "no argument 'imput_ids'"),
    "a cache of no size": ({"use_cache": True, "max_length": []}, "max_length is"),
    "a cache that is none": ({"cache": ((1, 2),)}, "cache is a tuple"),
    "logits_to_keep by index": ({"logits_to_keep": np.array([1, 2])}, "logits_to_keep is"),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_of_a_call(name, model):
    arguments, said = CALLS[name]
    with pytest.raises(InfiniteVLError, match=said):
        model(IDS_IN, **arguments)
    assert model(IDS_IN, return_dict=True, output_attentions=False).logits.shape == (1, 3, 272)


def test_a_cache_of_another_model_and_one_that_is_used_up(model):
    other = tiny_model(full_attention_config())
    with pytest.raises(InfiniteVLError, match="another model"):
        model(IDS_IN, cache=other.init_cache(1, 64))
    out = model(IDS_IN, use_cache=True)
    for _ in model.decode(out.logits[:, -1], out.cache, max_new_tokens=3, **NEVER):
        pass
    with pytest.raises(InfiniteVLError, match="used up"):
        model(IDS_IN, cache=out.cache)


def test_a_cache_counts_to_the_end_of_int32_and_no_further(model):
    cache = model.init_cache(1)
    near = cache._replace(length=cache.length + (2**31 - 4), next_position=cache.next_position + 7)
    assert model(IDS_IN, cache=near).cache.length.tolist() == [2**31 - 1]
    for far in (
        near._replace(length=near.length + 1),
        cache._replace(next_position=cache.length + (2**31 - 3)),
    ):
        with pytest.raises(InfiniteVLError, match="its cache counts to 2,147,483,647"):
            model(IDS_IN, cache=far)
        with pytest.raises(InfiniteVLError, match="its cache counts to 2,147,483,647"):
            next(model.decode(np.zeros((1, 272)), far, max_new_tokens=9))


def test_calls_of_any_length_compile_nothing_new(model):
    """Text that follows a cache, read with its logits: lengths of one bucket share all programs."""
    compiled = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    cache = model.init_cache(1)
    for length in (3, 64):
        cache = model(np.full((1, length), 100), cache=cache).cache
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for length in (5, 17, 33, 41, 58, 63):
            out = model(
                np.full((1, length), 100), cache=cache, attention_mask=[[0, *[1] * (length - 1)]]
            )
            cache = out.cache
            assert out.logits.shape == (1, length, 272)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
