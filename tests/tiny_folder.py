"""A tiny random hybrid with a vision tower, a byte tokenizer and all files of a checkpoint."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tiny import hybrid_config

from infinitevl_jax import InfiniteVL
from infinitevl_jax.checkpoints import save_params
from infinitevl_jax.config.model import FULL, ModelConfig
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.processing.tokenizer import SPECIAL_TOKENS, _byte_letters

IDS = {token: 256 + i for i, token in enumerate(SPECIAL_TOKENS)}  # after the 256 byte tokens


def tiny_config(**changes) -> ModelConfig:
    """Two layers, sliding-window and Gated DeltaNet, with the byte tokenizer's special ids."""
    config = hybrid_config(
        layers=2, window=16, vocab_size=272, tie_word_embeddings=False, **changes
    )
    names = {
        name: IDS[f"<|{name.replace('image', 'image_pad').replace('video', 'video_pad')}|>"]
        for name in VISION
    }
    return dataclasses.replace(
        config,
        **{f"{name}_token_id": i for name, i in names.items()},
        pad_token_id=IDS["<|endoftext|>"],
        eos_token_ids=(IDS["<|endoftext|>"],),
    )


VISION = ("image", "video", "vision_start", "vision_end")


def full_attention_config() -> ModelConfig:
    """A text model with full attention."""
    config = tiny_config(layer_types=(FULL, FULL), mrope_section=None)
    return dataclasses.replace(config, vision=None, family="qwen2")


def tiny_model(config: ModelConfig, seed: int = 0) -> InfiniteVL:
    """Large random weights; output is limited to lower-case letters and end tokens."""
    rng = np.random.default_rng(seed)
    shapes = parameters(config, scanned=False)
    params = {
        name: rng.normal(scale=0.4, size=s.shape).astype("float32") for name, s in shapes.items()
    }
    mute = np.ones(config.text.vocab_size, bool)
    mute[[*range(97, 123), IDS["<|im_end|>"]]] = False
    params["lm_head.kernel"][:, mute] = 0
    params["lm_head.kernel"] *= 3
    return InfiniteVL(config, {name: jnp.asarray(p) for name, p in params.items()})


def write_tokenizer(folder: Path) -> None:
    """vocab.json and merges.txt of bytes and Qwen's special tokens; images of up to 16 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({letter: i for i, letter in enumerate(_byte_letters())}), "utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {str(i): {"content": token, "special": True} for token, i in IDS.items()}
    settings = {
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(
            json.dumps({"patch_size": 2, "min_pixels": 64, "max_pixels": 256})
        )


def write_folder(folder: Path, model: InfiniteVL) -> Path:
    """Write a complete checkpoint folder."""
    write_tokenizer(folder.with_name(folder.name + "-side"))
    save_params(
        folder, model.params, model.config, side_files_from=folder.with_name(folder.name + "-side")
    )
    return folder
