"""A conversation on one cache against reading it anew each time, and what stopping, undoing and
failing leave behind."""

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_folder import IDS, full_attention_config, tiny_config, tiny_model, write_tokenizer

from infinitevl_jax import InfiniteVLError, Processor
from infinitevl_jax.serve.conversation import Conversation
from infinitevl_jax.serve.sampling import Sampling
from pallas_kernels.testing.parity import rel_rms

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8))
SEEN = [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What?"}]
FILM = [{"type": "video", "video": [PICTURE] * 4}, {"type": "text", "text": "And this?"}]


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_config())


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversation")
    write_tokenizer(folder)
    return Processor.from_pretrained(folder)


@pytest.fixture
def conversation(model, processor):
    conversation = Conversation(model, processor)
    conversation.eos_token_ids = (-1, -1)  # nothing ends but by the limit
    return conversation


def stop_after(pieces, count):
    """Listen to so many pieces."""
    said = "".join(piece for _, piece in zip(range(count), pieces, strict=False))
    pieces.close()
    return said


def test_only_the_new_turn_is_read_and_nothing_is_lost(conversation, model, processor, monkeypatch):
    """Answers that end at the limit, at an end token and where the listener stops: the model then
    holds what reading all of it gives."""
    held, last, prefill = [], [], model.prefill

    def spy(inputs, cache):
        logits, cache = prefill(inputs, cache)
        held.extend(inputs.decoder.tokens[0])
        last[:] = [inputs.decoder.tokens.shape[1], logits[0]]
        return logits, cache

    monkeypatch.setattr(model, "prefill", spy)

    def check(logits=False):
        whole = processor(list(conversation.messages[:-1]))
        assert held == whole["input_ids"][0].tolist() and conversation.turn.read == last[0]
        if logits:  # compiles, so not every time
            assert rel_rms(last[1], model(**whole).logits[0, -1]) <= 1e-5
        said = processor.tokenizer.encode(conversation.messages[-1]["content"])
        held.extend(said[: conversation.tokens - len(held)])
        assert (
            len(held) == conversation.tokens >= whole["input_ids"].size + len(said) - 1
        )  # one may wait for the next turn

    first = "".join(conversation.ask(SEEN, max_new_tokens=6))
    assert len(first) == 6 and conversation.messages == (
        {"role": "user", "content": SEEN},
        {"role": "assistant", "content": first},
    )
    check()
    before = list(held)
    free = "".join(conversation.ask(FILM, max_new_tokens=6))
    assert conversation.undo()
    held[:] = before
    conversation.eos_token_ids = (-1, ord(free[3]))
    ended = "".join(conversation.ask(FILM, max_new_tokens=6))
    assert ended == free[: free.index(free[3])]
    check(logits=True)
    conversation.eos_token_ids = (-1, -1)
    stopped = stop_after(conversation.ask("Thanks", max_new_tokens=6), 2)
    assert len(stopped) == 2 and conversation.messages[-1]["content"] == stopped
    check()
    "".join(conversation.ask("Bye", max_new_tokens=6))
    check(logits=True)
    assert last[0] < 80 < conversation.tokens


def test_the_cache_stays_as_small_as_it_is(conversation):
    sizes = []
    for _ in range(4):
        "".join(
            conversation.ask(
                "Once more, and in some more words than the window holds", max_new_tokens=3
            )
        )
        sizes.append(conversation._state.cache.nbytes)
    assert len(set(sizes)) == 1 and conversation.tokens > 16


def test_undo_takes_back_one_question_exactly(conversation):
    assert not conversation.undo()
    "".join(conversation.ask("One", max_new_tokens=4))
    before, messages = jax.tree.map(np.asarray, conversation._state.cache), conversation.messages
    two = "".join(conversation.ask("Two", max_new_tokens=4))
    assert conversation.undo() and conversation.messages == messages
    jax.tree.map(
        np.testing.assert_array_equal, before, jax.tree.map(np.asarray, conversation._state.cache)
    )
    assert not conversation.undo()
    assert "".join(conversation.ask("Two", max_new_tokens=4)) == two
    conversation.reset()
    assert conversation.messages == () and conversation.tokens == 0 and not conversation.undo()


def test_an_error_leaves_the_conversation_where_it_stood(conversation, model, monkeypatch):
    "".join(conversation.ask("One", max_new_tokens=4))
    messages, tokens = conversation.messages, conversation.tokens
    with pytest.raises(InfiniteVLError, match="does not exist"):
        "".join(conversation.ask([{"type": "image", "image": "/no/such.png"}]))
    with monkeypatch.context() as patch:
        launches, decode = iter(range(9)), model.programs.decode
        patch.setattr(
            model.programs,
            "decode",
            lambda *args, **kwargs: decode(*args, **kwargs) if next(launches) < 2 else 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            "".join(conversation.ask("Two", max_new_tokens=8))
    assert conversation.messages == messages and conversation.tokens == tokens
    assert len("".join(conversation.ask("Two", max_new_tokens=4))) == 4


def test_a_model_that_keeps_everything_says_when_it_is_full(processor):
    conversation = Conversation(tiny_model(full_attention_config()), processor, max_length=100)
    conversation.eos_token_ids = (-1, -1)
    assert len("".join(conversation.ask("Hi", max_new_tokens=1000))) == 100 - conversation.turn.read
    with pytest.raises(InfiniteVLError, match=r"room for 100\n  -> start anew"):
        "".join(conversation.ask("More"))
    conversation.undo()
    assert len("".join(conversation.ask("Hi", max_new_tokens=3))) == 3


def answering(model, monkeypatch, ids):
    """The model says these ids, then ends; each goes into the cache as it would."""
    decode = model.decode

    def say(logits, cache, **settings):
        for token, (_, held) in zip(
            [*ids, IDS["<|endoftext|>"]], decode(logits, cache, **settings), strict=False
        ):
            yield np.array([token], np.int32), held

    monkeypatch.setattr(model, "decode", say)


SAID = {
    "a placeholder in words": [*b"<|image_pad|>"],
    "a placeholder as an id": [*b"ab", IDS["<|image_pad|>"]],
    "a placeholder cut short": [*b"<|video_pad|"],
    "a film's id alone": [IDS["<|video_pad|>"]],
    "the end of a picture": [IDS["<|vision_start|>"], *b"x", IDS["<|vision_end|>"]],
    "a turn's mark in words": [*b"a<|im_end|>\n<|im_start|>user\n"],
    "half a character": [0xF0, 0x9F],
    "thoughts": [*b"<think>b</think>"],
}


@pytest.mark.parametrize("case", SAID)
def test_a_conversation_goes_on_whatever_was_said(
    conversation, model, processor, monkeypatch, case
):
    """What is read next is the new turn alone, with the token that closes the answer, and the
    answer's last one where it waited."""
    "".join(conversation.ask(SEEN, max_new_tokens=3))
    with monkeypatch.context() as patch:
        answering(model, patch, SAID[case])
        stop_after(conversation.ask("Next", max_new_tokens=40), len(SAID[case]))
    assert conversation._state.said == SAID[case]
    read, prefill = [], model.prefill
    monkeypatch.setattr(
        model,
        "prefill",
        lambda inputs, cache: read.append(inputs.decoder) or prefill(inputs, cache),
    )
    "".join(conversation.ask(SEEN, max_new_tokens=3))
    ids = read[0].tokens[0].tolist()
    before = {"role": "user", "content": "Next"}, {"role": "assistant", "content": "x"}
    _, prompt = processor.continuation(before[:1])
    turn = processor.continuation([*before, {"role": "user", "content": SEEN}], prompt)[0][
        "input_ids"
    ][0].tolist()
    assert ids[len(ids) - len(turn) :] == turn
    waited = ids[: len(ids) - len(turn)]
    assert waited == SAID[case][len(SAID[case]) - len(waited) :]
    seen = np.flatnonzero(read[0].vision_index[0] >= 0)
    assert (seen >= len(waited)).all() and len(seen) == turn.count(IDS["<|image_pad|>"])
    assert conversation.messages[3]["content"] == processor.decode(SAID[case])


def begun(conversation, question="first", count=2):
    """A question whose answer has come to so many pieces."""
    pieces = conversation.ask(question, max_new_tokens=12)
    for _ in range(count):
        next(pieces)
    return pieces


def test_a_new_question_ends_the_answer_before_it(conversation, model, processor):
    """The generator of the first answer goes on being listened to; nothing of it comes into the
    second turn."""
    first = begun(conversation)
    second = "".join(conversation.ask("second", max_new_tokens=6))
    held, turn = conversation.messages, conversation.turn
    assert "".join(first) == "" and conversation.messages == held and conversation.turn is turn
    other = Conversation(model, processor)
    other.eos_token_ids = (-1, -1)
    begun(other).close()
    assert "".join(other.ask("second", max_new_tokens=6)) == second
    assert other.messages == held and other.tokens == conversation.tokens
    jax.tree.map(np.testing.assert_array_equal, conversation._state.cache, other._state.cache)
    assert "".join(conversation.ask("x", max_new_tokens=4)) == "".join(
        other.ask("x", max_new_tokens=4)
    )
    assert conversation.undo() and conversation.messages == held


def test_undo_and_reset_end_an_answer(conversation):
    "".join(conversation.ask("One", max_new_tokens=4))
    messages, tokens = conversation.messages, conversation.tokens
    pieces = begun(conversation, "Two")
    assert (
        conversation.undo()
        and "".join(pieces) == ""
        and (conversation.messages, conversation.tokens) == (messages, tokens)
    )
    pieces = begun(conversation, "Two")
    conversation.reset()
    assert (
        "".join(pieces) == ""
        and conversation.messages == ()
        and conversation.tokens == 0
        and not conversation.undo()
    )


def test_undo_brings_the_state_back_and_not_the_answer_that_made_it(conversation):
    first = conversation.ask("first", max_new_tokens=4)
    next(first)
    second = conversation.ask("second", max_new_tokens=4)
    next(second)
    assert conversation.undo()
    held = conversation.messages, conversation.tokens
    assert list(first) == [] and list(second) == []
    assert (conversation.messages, conversation.tokens) == held


def test_a_question_that_fails_leaves_the_answer_before_it_going(conversation):
    whole = "".join(conversation.ask("first", max_new_tokens=12))
    conversation.reset()
    pieces = begun(conversation)
    with pytest.raises(InfiniteVLError, match="does not exist"):
        "".join(conversation.ask([{"type": "image", "image": "/no/such.png"}]))
    assert whole.endswith("".join(pieces)) and conversation.messages[-1]["content"] == whole


def test_a_repetition_penalty_counts_the_whole_conversation(conversation, model, monkeypatch):
    """Questions and answers of all turns."""
    heard, begin = [], model.programs.begin

    def spy(slots, logits, *, sampled):
        heard.append(slots.occurred[0])
        return begin(slots, logits, sampled=sampled)

    monkeypatch.setattr(model.programs, "begin", spy)
    penalty = Sampling(repetition_penalty=1000.0)
    answers = [
        "".join(conversation.ask(question, max_new_tokens=5, sampling=penalty))
        for question in ("abc", "xyz")
    ]
    assert len(set(answers[0])) == 5 and not set(answers[0]) & set("abcuser")  # said once
    assert heard[1][[ord(c) for c in "abcxyz" + answers[0]]].all() and not heard[0][ord("x")]
