"""Parameters out of a Hugging Face folder: torch tensors are sliced, turned and stacked into our
leaves, piece by piece."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from infinitevl_jax.checkpoints.dtypes import common
from infinitevl_jax.checkpoints.files import is_ours
from infinitevl_jax.checkpoints.lora import Adapter, Merged
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.source import Source, open_source
from infinitevl_jax.checkpoints.weights import Leaf, embedding_name, head_name, match, pieces
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families import family
from infinitevl_jax.families.huggingface import read_config as read_config_file

_BLOCK = 256  # columns turned at once: both sides of the copy stay in the processor's cache


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder, Hugging Face's or ours; the weights' names decide a
    head that nothing else does."""
    folder = Path(folder)
    config = read_config_file(folder)
    if is_ours(folder):
        tied = Manifest.read(folder).tie_word_embeddings
    else:
        tied = (
            True
            if _may_be_tied(config) and head_name(config) not in open_source(folder).names
            else None
        )
    return config if tied is None else _tie(config, tied)


def _may_be_tied(config: ModelConfig) -> bool:
    """Whether a missing head means one that shares the token table."""
    return family(config.family).missing_head_is_tied and not config.text.tie_word_embeddings


def _tie(config: ModelConfig, tied: bool) -> ModelConfig:
    return dataclasses.replace(
        config, text=dataclasses.replace(config.text, tie_word_embeddings=tied)
    )


def open_model(folder: Path, adapters: Sequence[str | Path] = ()) -> tuple[ModelConfig, Source]:
    """Configuration and tensors of a Hugging Face folder, checked against each other.

    Args:
      adapters: LoRA folders to merge; one that lies in `folder` itself is merged first.
    """
    config = read_config_file(folder)
    source = open_source(folder)
    beside = [folder] if (folder / "adapter_config.json").exists() else []
    if folders := [*beside, *map(Path, adapters)]:
        source = Merged(source, [Adapter(path) for path in folders])
    if _may_be_tied(config) and head_name(config) not in source.names:
        config = _tie(config, True)
    match(config, source.shapes, str(folder))
    if config.text.tie_word_embeddings and head_name(config) in source.names:
        _check_tied(source, embedding_name(config), head_name(config))
    return config, source


def _check_tied(source: Source, table: str, head: str) -> None:
    (rows, _), step = source.shapes[head], 4096
    same = source.dtype(head) == source.dtype(table)
    for start in range(0, rows, step):
        part = (slice(start, start + step),)
        if not same or source.read(head, part).tobytes() != source.read(table, part).tobytes():
            raise InfiniteVLError(
                f"{source.folder}: tie_word_embeddings is on, but {head} and {table} differ"
                + (f" from row {start} to {min(start + step, rows)}" if same else " in dtype"),
                "set tie_word_embeddings to false in config.json if the model has a head of its"
                " own, else delete the head",
            )


def leaf_dtype(source: Source, leaf: Leaf) -> np.dtype:
    """dtype of one of our leaves: its tensors' own."""
    return common([source.dtype(name) for name in leaf.torch])


def read_leaf(
    source: Source, leaf: Leaf, dtype: np.dtype, index: tuple[slice, ...] | None = None
) -> np.ndarray:
    """One of our leaves, or `leaf[index]` of it, as a fresh array; only those bytes are read."""
    index = tuple(
        slice(*part.indices(size))
        for part, size in zip(index or [slice(None)] * len(leaf.shape), leaf.shape, strict=True)
    )
    out = np.empty([part.stop - part.start for part in index], dtype)
    for place, within, name in pieces(leaf, index):
        target = out[place] if leaf.stacked else out
        if not leaf.transposed:
            target[...] = source.read(name, within)
            continue
        part = source.read(name, within[::-1])
        for start in range(0, len(part), _BLOCK):
            target[:, start : start + _BLOCK] = part[start : start + _BLOCK].T
    return out
