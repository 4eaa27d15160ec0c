"""A stream's pieces add up to the text of all tokens."""

import time

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.processing import Tokenizer


def streamed(tokenizer, ids, skip=True):
    stream = tokenizer.stream(skip)
    return "".join(stream.push(i) for i in ids) + stream.finish()


def test_a_broken_character_does_not_swallow_the_whole_one_behind_it(builtin):
    encode = builtin.tokenizer.encode
    hiero = encode("\U00013000")
    for ids, text in [
        (hiero[:-1] + encode(" ok"), "\ufffd ok"),
        (hiero[:-1] + hiero + encode(" ok"), "\ufffd\U00013000 ok"),
        (encode("a") + hiero[:-1], "a\ufffd"),
        (hiero[:1] * 9 + hiero, None),
        (encode("\ufffd tail \ufffd"), "\ufffd tail \ufffd"),
    ]:
        assert (
            streamed(builtin.tokenizer, ids) == builtin.decode(ids) == (text or builtin.decode(ids))
        )


@pytest.mark.parametrize("seed", range(4))
def test_random_tokens(builtin, byte_folder, seed):
    """Random bytes of one vocabulary; tokens of the other, some missing, some special."""
    rng = np.random.default_rng(seed)
    single = Tokenizer.from_folder(byte_folder)
    pool = (
        [chr(int(c)) for c in rng.integers(0x1F300, 0x1FAFF, 200)]
        + list("abc \u00e9\u6f22\u5b57 ")
        + ["<|im_end|>"]
    )
    for skip in (True, False):
        for _ in range(50):
            ids = rng.integers(0, len(single), rng.integers(1, 40)).tolist()
            assert streamed(single, ids, skip) == single.decode(ids, skip)
            ids = [
                i
                for i in builtin.tokenizer.encode("".join(rng.choice(pool, 12)))
                if rng.random() < 0.8
            ]
            assert streamed(builtin.tokenizer, ids, skip) == builtin.decode(ids, skip)


def test_text_is_said_as_soon_as_it_is_certain(builtin):
    stream, encode = builtin.stream(), builtin.tokenizer.encode
    hiero = encode("\U00013000")
    assert [stream.push(i) for i in [*encode("a"), *hiero, *encode("b")]] == [
        "a",
        "",
        "",
        "\U00013000",
        "b",
    ]
    assert [stream.push(i) for i in [*hiero[:-1], *encode("c")]] == ["", "", "\ufffdc"]


def test_broken_bytes_without_end_cost_no_more_than_others(byte_folder):
    tokenizer = Tokenizer.from_folder(byte_folder)
    broken = tokenizer.encode("\u0080")[1]  # a byte that begins nothing
    stream, began = tokenizer.stream(), time.perf_counter()
    text = "".join(stream.push(broken) for _ in range(20_000))
    assert text + stream.finish() == "\ufffd" * 20_000 and len(stream._pending) == 0
    assert time.perf_counter() - began < 10


def byte_fallback():
    """A vocabulary with byte fallback, as Llama's: any byte of a run may make it invalid."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁a": 256, "b": 257, "<unk>": 258}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend, "test")


def test_bytes_of_a_fallback_vocabulary():
    tokenizer = byte_fallback()
    emoji = list("🦊".encode())
    for ids in (
        [256, *emoji, 257, 256],
        [*emoji, *emoji[:2], 257],
        [256, *emoji, 0xF0],
        [256, 256],
        [*emoji[:3]],
    ):
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.choice([256, 257, *emoji, *emoji, 0xC3, 0xA9], 12).tolist()
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("ids", [[-1], [1.5], [[1], [2, 3]], ["a"], [2**40], [None], [True]])
def test_what_is_no_token_is_refused(builtin, ids):
    with pytest.raises(InfiniteVLError, match="token ids are .*\n  -> pass integers"):
        builtin.decode(ids)


def test_ids_beyond_the_vocabulary_have_no_text(builtin):
    """A model's embedding is often larger than its tokenizer's vocabulary."""
    assert builtin.decode([9707, 151_900]) == "Hello" and builtin.decode([]) == ""
    assert streamed(builtin.tokenizer, [9707, 151_900, 0]) == "Hello!"
