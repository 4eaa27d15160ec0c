import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from infinitevl_jax.processing import Processor, Tokenizer
from infinitevl_jax.processing.tokenizer import SPECIAL_TOKENS

# ids of Qwen2.5's tokenizer.json
PUBLISHED = [
    ("Hello, world!", [9707, 11, 1879, 0]),
    ("What is the capital of France?", [3838, 374, 279, 6722, 315, 9625, 30]),
    (
        "def f(x):\n    return x ** 2  # square\n",
        [750, 282, 2075, 982, 262, 470, 856, 3070, 220, 17, 220, 671, 9334, 198],
    ),
    ("图中有几只猫？", [28029, 105656, 99195, 91680, 100472, 11319]),
    (
        "日本語のテキスト、한국어 문장",
        [101059, 102819, 15767, 56833, 61803, 70534, 5373, 23573, 124785, 31079, 53435, 40853],
    ),
    ("naïve café cafe\u0301", [3376, 37572, 586, 51950, 51950]),
    ("🦊👩\u200d👩\u200d👧 emoji", [147440, 145233, 378, 235, 145233, 378, 235, 145665, 42365]),
    ("1234567890 3.14", [16, 17, 18, 19, 20, 21, 22, 23, 24, 15, 220, 18, 13, 16, 19]),
    (
        "  two  spaces\tand tab \n\n\r\n end ",
        [220, 1378, 220, 12621, 52477, 5651, 4710, 319, 835, 220],
    ),
    ("I'll they've WE'RE", [40, 3278, 807, 3003, 19677, 94153]),
    (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Hi<|im_end|>",
        [151644, 872, 198, 151652, 151655, 151653, 13048, 151645],
    ),
    ("<tool_call>{}</tool_call>", [151657, 6257, 151658]),
    (
        "Привет, мир: ∑∞≈ ½",
        [53645, 26991, 8178, 11, 137144, 25, 11995, 239, 144677, 144540, 220, 26062],
    ),
    ("مرحبا بالعالم นี่คือ", [124122, 29825, 124671, 124476, 129634, 220, 20184, 47171, 40327, 83581]),
    ("a" * 30, [69440, 69440, 69440, 28458, 5305]),
]


@pytest.fixture(scope="module")
def qwen():
    return Tokenizer.builtin()


@pytest.mark.parametrize(("text", "ids"), PUBLISHED, ids=[str(i) for i in range(len(PUBLISHED))])
def test_builtin_gives_the_published_ids(qwen, text, ids):
    assert qwen.encode(text) == ids
    assert qwen.decode(ids, skip_special_tokens=False) == text.replace("cafe\u0301", "café")  # NFC


def test_builtin_has_the_published_size_and_ends(qwen):
    assert len(qwen) == 151_665
    assert [qwen.token_id(token) for token in SPECIAL_TOKENS] == list(range(151_643, 151_657))
    assert qwen.eos_ids == (151_645, 151_643) and qwen.pad_id == 151_643
    assert qwen.token_id("<|no_such_token|>") is None
    assert qwen.decode([151_644, 13048, 151_645]) == "Hi"
    assert qwen.decode(np.array([13048, 151_657])) == "Hi<tool_call>"  # added, but not special


def test_builtin_equals_transformers(qwen, reference):
    text = Path(__file__).read_text("utf-8")
    assert qwen.encode(text) == reference.tokenizer(text)["input_ids"]


def test_builtin_is_built_once(qwen):
    assert Tokenizer.builtin().backend is qwen.backend


def test_vocab_and_merges_files_give_the_same_tokenizer(qwen, tmp_path):
    qwen.backend.model.save(str(tmp_path))
    again = Tokenizer.from_folder(tmp_path)
    assert "vocab.json and merges.txt" in again.source
    assert [again.encode(text) for text, _ in PUBLISHED] == [ids for _, ids in PUBLISHED]


def test_tokenizer_json_wins_and_its_settings_count(tmp_path, byte_folder):
    made = Tokenizer.from_folder(byte_folder)
    made.backend.add_tokens(["<answer>"])
    made.backend.save(str(byte_folder / "tokenizer.json"))
    (byte_folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [258, 256, 270]})
    )
    tokenizer = Tokenizer.from_folder(byte_folder)
    assert tokenizer.source.endswith("tokenizer.json") and tokenizer.token_id("<answer>") == 270
    assert tokenizer.eos_ids == (258, 256, 270) and tokenizer.pad_id == 256
    assert tokenizer.special == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    assert tokenizer.decode(tokenizer.encode("ünï 🦊")) == "ünï 🦊"


def test_an_empty_folder_gets_the_builtin_one(tmp_path):
    assert Tokenizer.from_folder(tmp_path).source == "built-in Qwen2.5"


@pytest.mark.parametrize(
    "text",
    ["plain words", "🦊👩\u200d👩\u200d👧🇩🇪", "图中有几只猫？\n", "مرحبا", "tail \ufffd kept"],
)
def test_stream_gives_whole_characters_in_time(byte_folder, qwen, text):
    for tokenizer in (qwen, Tokenizer.from_folder(byte_folder)):
        stream, said = tokenizer.stream(), ""
        ids = tokenizer.encode(text)
        for i, token in enumerate(ids):
            piece = stream.push(token)
            said += piece
            assert "\ufffd" in text or "\ufffd" not in piece
            whole = tokenizer.decode(ids[: i + 1])
            assert said == whole or ("\ufffd" in whole and said == whole.rstrip("\ufffd"))
        assert said + stream.finish() == text


def test_stream_gives_up_on_bytes_that_never_join(byte_folder):
    tokenizer = Tokenizer.from_folder(byte_folder)
    ids = [
        *tokenizer.encode("a"),
        187 + 30,
        *[tokenizer.encode("ü")[0]] * 6,
        *tokenizer.encode("b"),
    ]
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids] + [stream.finish()]
    assert (
        pieces[0] == "a"
        and "".join(pieces).endswith("b")
        and any("\ufffd" in piece for piece in pieces)
    )


def test_stream_keeps_the_spaces_of_word_decoders():
    backend = tokenizers.Tokenizer(
        models.WordLevel({"▁two": 0, "▁words": 1, "[UNK]": 2}, unk_token="[UNK]")
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    stream = Tokenizer(backend, "test").stream()
    assert [stream.push(0), stream.push(1), stream.push([0, 1])] == ["two", " words", " two words"]


def test_pickle(byte_folder):
    processor = Processor.from_pretrained(byte_folder)
    again = pickle.loads(pickle.dumps(processor))
    assert again.tokenizer.encode("Hi<|im_end|>") == processor.tokenizer.encode("Hi<|im_end|>")
    assert again.tokenizer.eos_ids == processor.tokenizer.eos_ids
