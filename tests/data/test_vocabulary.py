"""The vocabulary of bytes and shared words."""

import pytest

from infinitevl_jax import InfiniteVLError, Processor
from infinitevl_jax.config.model import VisionConfig
from infinitevl_jax.data.vocabulary import SPECIAL, byte_tokenizer, write_processor_files

TEXTS = [f"how many {colour} shapes? {i}" for i in range(20) for colour in ("red", "blue")]
TEXTS += ["what does it say? rare", "what does it say? seldom"]


def test_words_that_many_texts_share_are_tokens(tmp_path):
    tokenizer = byte_tokenizer(TEXTS, 1536)
    assert tokenizer.to_str() == byte_tokenizer(reversed(TEXTS), 1536).to_str()
    words = set(tokenizer.get_vocab()) - set(SPECIAL)
    assert {w for w in words if len(w) > 1} == {
        *("how", "Ġmany", "Ġred", "Ġblue", "Ġshapes"),
        *("what", "Ġdoes", "Ġit", "Ġsay"),
    }
    assert tokenizer.encode("how many red shapes? 17").tokens == [
        *("how", "Ġmany", "Ġred", "Ġshapes", "?", "Ġ", "1", "7")
    ]
    assert tokenizer.encode("rare").tokens == list("rare")
    few = byte_tokenizer(TEXTS, 256 + len(SPECIAL) + 2)
    assert few.get_vocab_size() == 266 and few.token_to_id("how") is not None
    with pytest.raises(InfiniteVLError, match="bytes and special tokens are 264"):
        byte_tokenizer(TEXTS, 100)
    write_processor_files(tmp_path, tokenizer, VisionConfig())
    processor = Processor.from_pretrained(tmp_path)
    for text in ("How many red shapes?", "Größe: 3 €, \n日本", "total 12.50!"):
        assert processor.decode(processor.tokenizer.encode(text)) == text
    assert processor.tokenizer.encode("how many") == tokenizer.encode("how many").ids
