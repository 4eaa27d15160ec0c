"""Preparation of a run: configuration, processor, and the source of its parameters."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
from jax.sharding import NamedSharding

from infinitevl_jax import checkpoints, special_tokens
from infinitevl_jax.checkpoints.destination import new_folder
from infinitevl_jax.checkpoints.files import copy_side_files, side_files
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.save import run_manifest
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.presets import ModelSource
from infinitevl_jax.data.conversation import texts
from infinitevl_jax.data.mixture import Mixture
from infinitevl_jax.data.sources import Source, readable
from infinitevl_jax.data.vocabulary import word_tokenizer, write_processor_files
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.huggingface import read_config, to_huggingface
from infinitevl_jax.nn.params import Params, initialize
from infinitevl_jax.processing import Processor
from infinitevl_jax.processing.folder import write_pixel_limits


@dataclass(frozen=True)
class Start:
    """A model before its first step.

    Attributes:
      files: folder with config.json and processor files.
      manifest: additional facts for export.
      params: creates the parameters (scanned layout) with the given shardings.
    """

    config: ModelConfig
    processor: Processor
    files: Path
    manifest: Manifest
    params: Callable[[Mapping[str, NamedSharding]], Params]


def prepare_start(model: ModelSource, source: Mixture | Source, run: Path, seed: int) -> Start:
    """Open the preset's checkpoint folder, or write the files of a new model to RUN/model.

    If the preset changes the folder's image size limits, RUN/model gets a copy with that change.
    """
    limits = {
        name: value
        for name in ("min_pixels", "max_pixels")
        if (value := getattr(model, name)) is not None
    }
    folder = run / "model" if limits or not model.from_ else Path(model.from_)
    if folder == run / "model" and not folder.exists():
        with new_folder(folder) as work:
            if model.from_:
                copy_side_files(existing_folder(model.from_, "model.from"), work)
            else:
                _write_files(model, source, work)
            if limits:
                write_pixel_limits(work, limits)
    try:
        # weight names decide what config.json leaves open
        config = checkpoints.read_config(model.from_) if model.from_ else read_config(folder)
        processor = Processor.from_pretrained(folder)
    except InfiniteVLError as error:
        if folder == run / "model":  # written by this project
            raise InfiniteVLError(
                error.culprit, f"remove {folder}: the same command writes it again"
            ) from error
        raise
    tied = config.text.tie_word_embeddings
    if not model.from_:
        fresh = partial(initialize, config, jax.random.key(seed), scanned=True)
        return Start(
            config,
            processor,
            folder,
            Manifest(tie_word_embeddings=tied),
            lambda shardings: fresh(shardings=shardings),
        )
    origin = Path(model.from_)
    side_files(origin)  # raises early if files could not be copied to a checkpoint
    manifest = run_manifest(origin, config)

    def load(shardings):
        return checkpoints.load_params(origin, scanned=True, shardings=shardings)[1]

    return Start(config, processor, folder, manifest, load)


def existing_folder(name: str, key: str) -> Path:
    """The folder named by the preset's `key`. Raises InfiniteVLError if there is none."""
    folder = Path(name)
    try:
        found = folder.is_dir()
    except OSError as error:  # for example a name that is too long
        raise InfiniteVLError(
            f"{key} is {name!r}: {error.strerror}", "name a checkpoint folder"
        ) from None
    if not found:
        words = ', or "words"' if key == "model.tokenizer" else ""
        raise InfiniteVLError(
            f"{key} is {name!r}, which is no folder", f"name a checkpoint folder{words}"
        )
    return folder


def _write_files(model: ModelSource, source: Mixture | Source, folder: Path) -> None:
    """Write config.json and processor files of a new model."""
    text, vision = model.text, model.vision
    if model.tokenizer == "words":
        if vision is None:
            raise InfiniteVLError(
                'model.tokenizer is "words" for a text model',
                "give [model.vision], or a folder in model.tokenizer",
            )
        tokenizer = word_tokenizer(text for row in readable(source) for text in texts(row))
        write_processor_files(folder, tokenizer, vision)
        text = dataclasses.replace(text, vocab_size=tokenizer.get_vocab_size())
    else:
        origin = existing_folder(model.tokenizer, "model.tokenizer")
        copy_side_files(origin, folder, skip=("config.json",))
        tokenizer = Processor.from_pretrained(folder).tokenizer.backend
        if text.vocab_size < tokenizer.get_vocab_size():
            raise InfiniteVLError(
                f"model.text.vocab_size is {text.vocab_size}, the tokenizer of {origin} has"
                f" {tokenizer.get_vocab_size()} tokens",
                f"model.text.vocab_size={tokenizer.get_vocab_size()} or more",
            )
    names = {**special_tokens.VISION_TOKENS, "pad_token_id": special_tokens.END_OF_TEXT}
    ids = {key: tokenizer.token_to_id(token) for key, token in names.items()}
    ends = tuple(tokenizer.token_to_id(token) for token in special_tokens.EOS_TOKENS)
    if missing := [names[key] for key, value in ids.items() if value is None]:
        raise InfiniteVLError(
            f"the tokenizer of {model.tokenizer} has no {', '.join(missing)}",
            "use one with Qwen's special tokens",
        )
    config = ModelConfig(
        text=text,
        vision=vision,
        eos_token_ids=ends,
        initializer_range=model.initializer_range,
        **ids,
    )
    (folder / "config.json").write_text(
        json.dumps(to_huggingface(config), indent=2) + "\n", "utf-8"
    )
