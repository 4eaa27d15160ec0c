"""Small checkpoint folders, and transformers' processor as the reference."""

import json

import pytest
from transformers import Qwen2_5_VLProcessor, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from infinitevl_jax.processing import ChatTemplate, Processor, Tokenizer
from infinitevl_jax.processing.tokenizer import SPECIAL_TOKENS, _byte_letters


def write_json(path, value):
    path.write_text(json.dumps(value), "utf-8")


@pytest.fixture
def byte_folder(tmp_path):
    """A folder with a tokenizer of bytes and Qwen's special tokens, as vocab.json + merges.txt."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_json(folder / "vocab.json", {letter: i for i, letter in enumerate(_byte_letters())})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(256 + i): {"content": token, "special": True} for i, token in enumerate(SPECIAL_TOKENS)
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": added,
            "eos_token": "<|im_end|>",
            "pad_token": {"content": "<|endoftext|>"},
        },
    )
    return folder


@pytest.fixture(scope="session")
def builtin():
    return Processor()


class _WithoutVideo(Qwen2_5_VLProcessor):
    """transformers' processor without video, which needs torchvision."""

    def check_argument_for_proper_class(self, name, argument):
        return type(argument)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """transformers' Qwen2.5-VL processor with the same tokenizer and template."""
    folder = tmp_path_factory.mktemp("reference")
    Tokenizer.builtin().backend.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "padding_side": "left"},
    )
    return _WithoutVideo(
        image_processor=Qwen2VLImageProcessorPil(),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder),
        video_processor=None,
        chat_template=ChatTemplate.builtin().text,
    )
