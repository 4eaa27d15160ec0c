"""Tokenizer and processor files for a small model with its own vocabulary: one token for each word
of the training questions.

Qwen's embedding table, 151,936 rows, would be many times larger than such a model.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

from infinitevl_jax import special_tokens
from infinitevl_jax.config.model import VisionConfig

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
        "unk_token": "<unk>",
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
