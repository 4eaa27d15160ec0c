"""Processor folders that the kinds mutate, and what they mean.

Written here again, without the package's own words.
"""

import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image
from tiny_folder import IDS, write_tokenizer
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from torch_folders import HYBRID

from infinitevl_jax.processing.tokenizer import _byte_letters

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("o", "r")]
TEXTS = [
    "hello world",
    "<|im_start|>user\nhell<|im_end|>",
    "1234 ½ é ﬁ 日本 \U0001f600\n\n  x",
    "",
    " ",
    "she'll",
]


LATER = {
    token: i + len(MERGES) for token, i in IDS.items()
}  # the special tokens' ids after the merges'


def config(ids: dict[str, int]) -> dict:
    """config.json's part that a processor reads."""
    named = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    named |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    return (
        HYBRID
        | {key: ids[token] for key, token in named.items()}
        | {"vocab_size": 280, "eos_token_id": ids["<|im_end|>"]}
    )


def bytes_only(folder: Path, ids: dict[str, int] = IDS) -> None:
    """One token a byte (vocab.json, merges.txt), Qwen's special tokens from 256 on.

    Patches of 2 x 2 pixels.
    """
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(i): {"content": token, "special": True} for token, i in ids.items()
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config(ids)))
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]})
    )


def with_merges(folder: Path) -> None:
    """The same with a few merges, and added_tokens.json."""
    bytes_only(folder, LATER)
    vocab = {letter: i for i, letter in enumerate(_byte_letters())}
    vocab |= {a + b: 256 + i for i, (a, b) in enumerate(MERGES)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    (folder / "added_tokens.json").write_text(json.dumps(LATER))


def one_file(folder: Path) -> None:
    """The same as a tokenizer.json, every section of which is in use."""
    with_merges(folder)
    vocab = json.loads((folder / "vocab.json").read_text())
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in IDS])
    backend.save(str(folder / "tokenizer.json"))
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (folder / name).unlink()


SPECIAL = re.compile("(" + "|".join(map(re.escape, IDS)) + ")")


def byte_ids(text: str) -> list[int]:
    """Ids of text in the tokenizer of bytes.

    NFC, a special token where one is spelled, else a byte each.
    """
    ids: list[int] = []
    for part in SPECIAL.split(text):
        ids += [IDS[part]] if part in IDS else unicodedata.normalize("NFC", part).encode()
    return ids


def prompt_ids(messages: list[dict], answer: bool = True) -> list[int]:
    """Ids of Qwen's chat format of messages that are well formed, in the tokenizer of bytes.

    A picture is one placeholder between its markers. What an assistant says is words alone: special
    tokens that it spells are bytes.
    """
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    ids: list[int] = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(
                p["text"]
                if p["type"] == "text"
                else f"<|vision_start|><|{p['type']}_pad|><|vision_end|>"
                for p in content
            )
        head = f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            ids += [*byte_ids(head), *unicodedata.normalize("NFC", content).encode()]
        else:
            ids += byte_ids(head + content)
        ids += byte_ids("<|im_end|>\n")
    return ids + (byte_ids("<|im_start|>assistant\n") if answer else [])


def picture(width: int = 12, height: int = 8) -> Image.Image:
    """A small picture with an edge and a slope."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(
        np.stack([x * 20 % 256, y * 30 % 256, (x > y) * 200], -1).astype(np.uint8)
    )
