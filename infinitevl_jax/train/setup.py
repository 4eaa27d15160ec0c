"""Preparation of a run: configuration, processor, and the source of its parameters."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import tokenizers
from jax.sharding import Mesh

from infinitevl_jax import checkpoints, special_tokens
from infinitevl_jax.checkpoints.destination import new_folder
from infinitevl_jax.checkpoints.files import copy_side_files, side_files
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.checkpoints.packaged import NAMES
from infinitevl_jax.checkpoints.save import run_manifest
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.presets import ModelSource
from infinitevl_jax.config.student import derive
from infinitevl_jax.data.conversation import texts
from infinitevl_jax.data.mixture import Mixture
from infinitevl_jax.data.sources import Source, readable
from infinitevl_jax.data.vocabulary import byte_tokenizer, word_tokenizer, write_processor_files
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.huggingface import read_config, to_huggingface
from infinitevl_jax.nn.params import Params, initialize, parameters
from infinitevl_jax.nn.stack import Scanned
from infinitevl_jax.processing import Processor
from infinitevl_jax.processing.folder import write_pixel_limits
from infinitevl_jax.sharding import parameter_shardings
from infinitevl_jax.train.folder import PRESET

VOCABULARY_ROWS = 1000  # of each source, for a vocabulary of bytes and words


@dataclass(frozen=True)
class Start:
    """A model before its first step.

    Attributes:
      files: folder with config.json and processor files.
      manifest: additional facts for export.
      params: creates the parameters, in a stacked layout, on a mesh; of `source` if that is given.
      source: the attention model from which the model is derived.
    """

    config: ModelConfig
    processor: Processor
    files: Path
    manifest: Manifest
    params: Callable[[Scanned, Mesh], Params]
    source: ModelConfig | None = None


def prepare_start(model: ModelSource, source: Mixture | Source, run: Path, seed: int) -> Start:
    """Open the preset's checkpoint folder, or write the files of a new model to RUN/model.

    If the preset changes the folder's image size limits or mixers, RUN/model gets a copy of its
    files with that change.
    """
    limits = {
        name: value
        for name in ("min_pixels", "max_pixels")
        if (value := getattr(model, name)) is not None
    }
    origin = source_folder(model.from_, "model.from") if model.from_ else None
    folder = run / "model" if limits or model.mixers or origin is None else origin
    if folder == run / "model" and not folder.exists():
        with new_folder(folder) as work:
            if origin is not None:
                copy_side_files(origin, work, skip=("config.json",) if model.mixers else ())
                if model.mixers:
                    _write_config(derive(checkpoints.read_config(origin), model.mixers), work)
            else:
                _write_files(model, source, work)
            if limits:
                write_pixel_limits(work, limits)
    try:
        # weight names decide what config.json leaves open
        source = read_config(folder) if origin is None else checkpoints.read_config(origin)
        config = derive(source, model.mixers) if model.mixers else source
        processor = Processor.from_pretrained(folder)
    except InfiniteVLError as error:
        if folder == run / "model":  # written by this project
            raise InfiniteVLError(
                error.culprit, f"remove {folder}: the same command writes it again"
            ) from error
        raise
    tied = config.text.tie_word_embeddings
    if origin is None:

        def fresh(stacked: Scanned, mesh: Mesh) -> Params:
            places = parameter_shardings(parameters(config, scanned=stacked), mesh)
            key = jax.random.key(seed)
            return initialize(config, key, scanned=stacked, shardings=places)

        return Start(config, processor, folder, Manifest(tie_word_embeddings=tied), fresh)
    side_files(origin)  # raises early if files could not be copied to a checkpoint

    def load(stacked: Scanned, mesh: Mesh) -> Params:
        places = parameter_shardings(parameters(source, scanned=stacked), mesh)
        return checkpoints.load_params(origin, scanned=stacked, shardings=places)[1]

    if not model.mixers:
        return Start(config, processor, folder, run_manifest(origin, config), load)
    return Start(config, processor, folder, Manifest(tie_word_embeddings=tied), load, source)


def source_folder(name: str, key: str) -> Path:
    """The checkpoint folder named by the preset's `key`; of a run, its newest checkpoint; or a
    model of the package.

    Raises InfiniteVLError if there is none.
    """
    if name in NAMES:
        return checkpoint_folder(Path(name))
    folder = existing_folder(name, key)
    found = checkpoint_folder(folder)
    if found == folder and (folder / PRESET).exists():
        raise InfiniteVLError(
            f"{key} is {name!r}, a run that has no checkpoint yet",
            "train it first: the same command goes on with a run",
        )
    return found


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
        words = ', or "words" or "bytes"' if key == "model.tokenizer" else ""
        raise InfiniteVLError(
            f"{key} is {name!r}, which is no folder", f"name a checkpoint folder{words}"
        )
    return folder


def _write_files(model: ModelSource, source: Mixture | Source, folder: Path) -> None:
    """Write config.json and processor files of a new model."""
    text, vision = model.text, model.vision
    if model.tokenizer in ("words", "bytes"):
        if vision is None:
            raise InfiniteVLError(
                f'model.tokenizer is "{model.tokenizer}" for a text model',
                "give [model.vision], or a folder in model.tokenizer",
            )
        tokenizer = _own_tokenizer(model.tokenizer, source, text.vocab_size)
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
        family=model.family or ModelConfig.family,
        **ids,
    )
    _write_config(config, folder)


def _own_tokenizer(kind: str, source: Mixture | Source, size: int) -> tokenizers.Tokenizer:
    """A tokenizer of the words in the rows; of bytes and the words that some of the rows share."""
    if kind == "words":
        return word_tokenizer(text for row in readable(source) for text in texts(row))
    mixture = source if isinstance(source, Mixture) else Mixture({"": source})
    some = mixture.sample(VOCABULARY_ROWS).readable()
    return byte_tokenizer((text for row in some for text in texts(row)), size)


def _write_config(config: ModelConfig, folder: Path) -> None:
    content = json.dumps(to_huggingface(config), indent=2)
    (folder / "config.json").write_text(content + "\n", "utf-8")
