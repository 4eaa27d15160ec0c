"""Damaged, mixed or malicious tokenizer files are refused in little time."""

import json
import random
import time

import pytest

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.processing import ChatTemplate, Tokenizer
from infinitevl_jax.processing.tokenizer import SPECIAL_TOKENS, SPLIT, _byte_letters

LETTERS = {letter: i for i, letter in enumerate(_byte_letters())}
ADDED = [
    {"id": 256 + i, "content": token, "special": True} for i, token in enumerate(SPECIAL_TOKENS)
]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
GOOD = {
    "version": "1.0",
    "added_tokens": [token | FLAGS for token in ADDED],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    },
    "decoder": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    },
    "model": {"type": "BPE", "vocab": LETTERS, "merges": []},
}


def load(folder, content, name="tokenizer.json"):
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = Tokenizer.from_folder(folder)
    ChatTemplate.from_folder(folder)
    return tokenizer.decode(tokenizer.encode("Hello, 3 cafés\n"))


def refuses(action, *culprits):
    began = time.perf_counter()
    with pytest.raises(InfiniteVLError) as caught:
        action()
    message = str(caught.value)
    assert all(culprit in message for culprit in culprits) and caught.value.cure, message
    assert time.perf_counter() - began < 10


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps):
    return {"type": "Sequence", "normalizers": list(steps)}


BOMBS = {
    "doublings": (
        {"normalizer": sequence(*[replace({"String": "a"}, "aa")] * 20)},
        "1,048,576 times",
    ),
    "doublings inside": (
        {"normalizer": sequence(*[sequence(*[replace({"String": "a"}, "aa")] * 4)] * 4)},
        "65,536 times",
    ),
    "one long content": ({"normalizer": replace({"String": "e"}, "x" * 3000)}, "3,000 times"),
    "a content for nothing": ({"normalizer": replace({"Regex": "x*"}, "y" * 100)}, "101 times"),
    "an endless content": (
        {"normalizer": replace({"String": "e"}, "x" * 5000)},
        "normalizer.content",
    ),
    "an empty pattern": ({"normalizer": replace({"String": ""}, "x")}, "normalizer.pattern"),
    "a long prefix": ({"normalizer": {"type": "Prepend", "prepend": "x" * 1000}}, "prepend"),
    "a decoder that grows": (
        {"decoder": replace({"String": "e"}, "x" * 3000)},
        "decoder makes a text",
    ),
    "a repeated repetition": ({"normalizer": replace({"Regex": "(a+)+$"}, "b")}, "'(a+)+'"),
    "a split without end": (
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "(?:\\w*)*z"},
                "behavior": "Isolated",
            }
        },
        "repeats",
    ),
    "a crash": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAABAgMEBQYHCAk="}},
        "'Precompiled'",
    ),
    "a garbled map": (
        {"normalizer": sequence({"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"})},
        "'Precompiled'",
    ),
    "a panicking decoder": (
        {"decoder": {"type": "Strip", "content": "H", "start": 5, "stop": 5}},
        "decoder.start",
    ),
    "a decoder's huge strip": (
        {"decoder": {"type": "Strip", "content": "a", "start": 10**9, "stop": 0}},
        "decoder.start",
    ),
    "no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "pre_tokenizer.length"),
    "a huge id": (
        {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}},
        "model.vocab",
    ),
    "a negative id": (
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}},
        "model.vocab",
    ),
    "ids out of nothing": (
        {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
        "is not a tokenizer",
    ),
    "an unknown token's id": (
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5}},
        "is not a tokenizer",
    ),
    "no token for the unknown": (
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[X]"}},
        "is not a tokenizer",
    ),
    "chance": (
        {"model": {"type": "BPE", "dropout": 0.3, "vocab": LETTERS, "merges": []}},
        "model.dropout",
    ),
    "merges that do not fit": (
        {"model": {"type": "BPE", "vocab": LETTERS, "merges": ["zz yy"]}},
        "is not a tokenizer",
    ),
    "a merge of three": (
        {"model": {"type": "BPE", "vocab": LETTERS, "merges": [["a", "b", "c"]]}},
        "model.merges",
    ),
    "words of any length": (
        {"model": {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**9}},
        "max_input",
    ),
    "tokens by the million": (
        {"added_tokens": [ADDED[0] | {"content": f"<{i}>"} for i in range(70_000)]},
        "added_tokens",
    ),
    "a token of nothing": ({"added_tokens": [{"id": 1, "content": ""}]}, "added_tokens"),
    "a token without id": ({"added_tokens": [{"content": "a"}]}, "`id`"),
    "a step of another kind": ({"normalizer": "NFC"}, "normalizer: 'NFC': Expected `object"),
    "a step of no kind": ({"decoder": {"type": "Nothing"}}, "is not a tokenizer"),
    "half a character": ({"added_tokens": [{"id": 1, "content": "\ud83d"}]}, "is not a tokenizer"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_tokenizer_json(tmp_path, case):
    changes, *culprits = BOMBS[case]
    refuses(lambda: load(tmp_path, GOOD | changes), "tokenizer.json", *culprits)


def test_a_good_one_loads(tmp_path):
    assert load(tmp_path, GOOD) == "Hello, 3 cafés\n"
    steps = sequence(
        replace({"String": " "}, "▁"),
        {"type": "Prepend", "prepend": "▁"},
        replace({"Regex": "(?i:x|y)?z+[(a+)+]"}, ""),
    )
    assert load(tmp_path, GOOD | {"normalizer": steps}) == "▁Hello,▁3▁cafés\n"


def test_a_panic_at_the_first_question_is_an_error_too(builtin_like):
    with pytest.raises(InfiniteVLError, match="cannot decode"):
        builtin_like.decode([0, 1])


@pytest.fixture
def builtin_like():
    import tokenizers
    from tokenizers import decoders, models

    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.decoder = decoders.Strip("a", 5, 5)
    return Tokenizer(backend, "test")


TOKENIZER_CONFIG = "tokenizer_config.json"
OTHERS = {
    "list for an object": (TOKENIZER_CONFIG, [1], "Expected `object`"),
    "tokens in a list": (TOKENIZER_CONFIG, {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
    "tokens by name": (
        TOKENIZER_CONFIG,
        {"added_tokens_decoder": {"a": {"content": "b"}}},
        "'a', which is no id",
    ),
    "a number for a token": (
        TOKENIZER_CONFIG,
        {"added_tokens_decoder": {"256": 1}},
        "added_tokens_decoder",
    ),
    "null for a token": (
        TOKENIZER_CONFIG,
        {"added_tokens_decoder": {"256": None}},
        "added_tokens_decoder",
    ),
    "a token without words": (TOKENIZER_CONFIG, {"added_tokens_decoder": {"256": {}}}, "content"),
    "a number for words": (
        TOKENIZER_CONFIG,
        {"added_tokens_decoder": {"256": {"content": 3}}},
        "content",
    ),
    "a text for a switch": (
        TOKENIZER_CONFIG,
        {"added_tokens_decoder": {"256": {"content": "a", "special": "no"}}},
        "special",
    ),
    "a number for an end": (TOKENIZER_CONFIG, {"eos_token": 3}, "eos_token"),
    "a number for a template": (TOKENIZER_CONFIG, {"chat_template": 3}, "chat_template"),
    "templates without names": (TOKENIZER_CONFIG, {"chat_template": [{"template": "x"}]}, "name"),
    "no default template": (
        TOKENIZER_CONFIG,
        {"chat_template": [{"name": "tool_use", "template": "x"}]},
        "tool_use",
        "default",
    ),
    "a template too long": (
        TOKENIZER_CONFIG,
        {"chat_template": "x" * 200_000},
        "200,000 characters",
    ),
    "a template file too long": (
        "chat_template.jinja",
        "x" * 200_000,
        "chat_template.jinja has 200,000 bytes",
    ),
    "a template file of lists": (
        "chat_template.json",
        {"chat_template": [["x"]]},
        "chat_template.json",
    ),
    "an end that is text": ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id"),
    "a negative end": ("generation_config.json", {"eos_token_id": [-1]}, "eos_token_id"),
    "ends in ends": ("config.json", {"eos_token_id": [[1]]}, "eos_token_id"),
    "an end in a fraction": (
        "config.json",
        {"text_config": {"eos_token_id": 1.5}},
        "text_config.eos_token_id",
    ),
    "a vocabulary in words": ("config.json", {"vocab_size": "many"}, "vocab_size"),
    "roles in a list": ("special_tokens_map.json", {"eos_token": ["a"]}, "eos_token"),
    "ids in words": ("added_tokens.json", {"<a>": "256"}, "added_tokens.json"),
    "another id": ("added_tokens.json", {"<|im_end|>": 7}, "'<|im_end|>' has id 7"),
    "a gap": ("added_tokens.json", {"<new>": 400}, "'<new>' has id 400"),
    "depth": ("added_tokens.json", '{"a":' * 200_000 + "1" + "}" * 200_000, "added_tokens.json"),
    "digits": ("added_tokens.json", '{"a": ' + "9" * 5000 + "}", "added_tokens.json"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_files_beside_it(tmp_path, case):
    name, content, *culprits = OTHERS[case]
    load(tmp_path, GOOD)
    refuses(lambda: load(tmp_path, content, name), name, *culprits)


VOCABULARY = {
    "ids in words": ({"a": "0"}, "", "vocab.json"),
    "a list": (["a"], "", "vocab.json"),
    "merges of one": (LETTERS, "a\n", "merges.txt, line 1"),
    "merges of three": (LETTERS, "#version: 0.2\na b c\n", "merges.txt, line 2"),
    "merges of unknown parts": (LETTERS, "zz yy\n", "do not fit together"),
    "merges without end": (LETTERS, "a b\n" * 1_100_000, "merges.txt has 1,100,001 lines"),
    "merges in another code": (LETTERS, b"\xff\xfe\n", "merges.txt is not UTF-8"),
}


@pytest.mark.parametrize("case", VOCABULARY)
def test_vocabulary_and_merges(tmp_path, case):
    vocabulary, merges, culprit = VOCABULARY[case]
    (tmp_path / "merges.txt").write_bytes(merges if isinstance(merges, bytes) else merges.encode())
    refuses(lambda: load(tmp_path, vocabulary, "vocab.json"), culprit)


VALUES = [
    None,
    True,
    0,
    -1,
    2**40,
    1.5,
    "",
    "x",
    "\u0000",
    "a" * 5000,
    [],
    [1],
    [None],
    {},
    {"a": 1},
    {"type": "NFC"},
    10**30,
]


def places(tree, path=()):
    """All paths of a JSON value."""
    yield path
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in list(items)[:6]:
        yield from places(value, (*path, key))


@pytest.mark.parametrize("seed", range(3))
def test_any_value_anywhere_is_refused_or_works(tmp_path, seed):
    rng = random.Random(seed)
    whole, refused = list(places(GOOD)), 0
    for _ in range(60):
        content = json.loads(json.dumps(GOOD))
        *path, last = rng.choice([p for p in whole if p])
        target = content
        for key in path:
            target = target[key]
        target[last] = rng.choice(VALUES)
        try:
            assert isinstance(load(tmp_path, content), str)
        except InfiniteVLError as error:
            refused += 1
            assert "tokenizer.json" in str(error)
    assert 20 < refused < 60


def test_tokens_that_only_added_tokens_json_lists_are_kept(tmp_path):
    """Also beside tokenizer.json, without a tokenizer, and for tokens with a role."""
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<answer>": 270, "<end>": 271}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<end>"}, "additional_special_tokens": []})
    )
    assert load(tmp_path, GOOD)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<answer>a<end>") == [270, LETTERS["a"], 271]
    assert tokenizer.decode([270, LETTERS["a"], 271]) == "<answer>a" and tokenizer.eos_ids == (
        258,
        271,
    )
    assert tokenizer.special == {"eos_token": "<end>"}


def test_added_tokens_beside_a_vocabulary_and_alone(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.json").write_text(json.dumps(LETTERS))
    (old / "merges.txt").write_text("")
    (old / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 257, "<|endoftext|>": 256}))
    tokenizer = Tokenizer.from_folder(old)
    assert tokenizer.encode("a<|im_end|>") == [LETTERS["a"], 257] and tokenizer.eos_ids == (257,)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "added_tokens.json").write_text(json.dumps({"<answer>": 151_665}))
    assert Tokenizer.from_folder(alone).encode("<answer>") == [151_665]
    assert Tokenizer.builtin().token_id("<answer>") is None


# Pre-tokenizers of GPT-2, Llama 3, Qwen2.5, GPT-4o, DeepSeek V3, and a group of letters.
EXPRESSIONS = [
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    SPLIT,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
        r" ?[\p{P}\p{S}]+[\r\n]*"
    ),
    r"(?:\p{Lu}|\p{Ll})+",
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_published_expressions_are_taken(tmp_path, expression):
    split = {
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": "Isolated",
        "invert": False,
    }
    steps = {"type": "Sequence", "pretokenizers": [split, GOOD["pre_tokenizer"]]}
    assert load(tmp_path, GOOD | {"pre_tokenizer": steps}) == "Hello, 3 cafés\n"
