"""Tokenizer and processor files for a small model with its own vocabulary: one token for each word
of the training questions, or bytes and the words that many texts share.

Qwen's embedding table, 151,936 rows, would be many times larger than such a model.
"""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from infinitevl_jax import special_tokens
from infinitevl_jax.config.model import VisionConfig
from infinitevl_jax.errors import InfiniteVLError

SPECIAL = [
    special_tokens.END_OF_TEXT,
    special_tokens.START_OF_TURN,
    special_tokens.END_OF_TURN,
    special_tokens.VISION_START,
    special_tokens.VISION_END,
    "<|vision_pad|>",
    special_tokens.IMAGE,
    special_tokens.VIDEO,
]

SHARED = 1e-3  # share of the texts that hold a word, from which on it is a token

# <question><|im_end|> becomes <question><|im_start|><answer><|im_end|>: as few tokens as a question
# can be
TEMPLATE = """\
{%- for message in messages -%}
    {%- if message["role"] == "assistant" -%}{{- "<|im_start|>" -}}{%- endif -%}
    {%- if message["content"] is string -%}
        {{- message["content"] -}}
    {%- else -%}
        {%- for part in message["content"] -%}
            {%- if part["type"] == "text" -%}
                {{- part["text"] -}}
            {%- else -%}
                {{- "<|vision_start|><|" ~ part["type"] ~ "_pad|><|vision_end|>" -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {%- if message["role"] == "assistant" -%}{{- "<|im_end|>" -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>" -}}{%- endif -%}
"""


def word_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """One token for every word and punctuation mark of `texts`, in alphabetic order, then the
    special tokens."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = split
    return _with_special_tokens(tokenizer)


def byte_tokenizer(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    """The 256 bytes, then words that many of `texts` share, then the special tokens.

    Words that few texts have, such as those to read in pictures, and numbers are spelled in bytes.

    Args:
      size: tokens at most.

    Raises:
      InfiniteVLError: bytes and special tokens are more.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = size - len(alphabet) - len(SPECIAL)
    if room < 0:
        raise InfiniteVLError(
            f"model.text.vocab_size is {size}", f"bytes and special tokens are {size - room}"
        )
    split = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    counts: Counter[str] = Counter()
    number = 0
    for text in texts:
        counts.update({word for word, _ in split.pre_tokenize_str(text)} - set(alphabet))
        number += 1
    common = [word for word, count in counts.items() if count >= max(2, SHARED * number)]
    words = sorted(sorted(common, key=lambda word: (-counts[word], word))[:room])
    model = models.BPE({w: i for i, w in enumerate([*alphabet, *words])}, [], ignore_merges=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    return _with_special_tokens(tokenizer)


def _with_special_tokens(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    )
    return tokenizer


def write_processor_files(
    folder: Path, tokenizer: tokenizers.Tokenizer, vision: VisionConfig
) -> None:
    """tokenizer.json, tokenizer_config.json, chat_template.jinja and preprocessor_config.json, as
    Hugging Face names them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special_tokens.END_OF_TURN,
        "pad_token": special_tokens.END_OF_TEXT,
        "unk_token": "<unk>" if tokenizer.token_to_id("<unk>") is not None else None,
        "clean_up_tokenization_spaces": False,
    }
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 1003520,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    for name, content in (
        ("tokenizer_config.json", settings),
        ("preprocessor_config.json", images),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
