"""Parameters in memory as one of our folders."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import msgspec
import numpy as np

from infinitevl_jax.checkpoints.destination import new_folder
from infinitevl_jax.checkpoints.dtypes import FLOATS, common
from infinitevl_jax.checkpoints.files import PARAMS, copy_side_files, is_ours
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.reading import read_config
from infinitevl_jax.checkpoints.source import open_source
from infinitevl_jax.checkpoints.weights import complain, embedding_name, head_name, leaves
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.huggingface import to_huggingface


def save_params(
    folder: str | Path,
    params: Mapping[str, jax.Array],
    config: ModelConfig,
    *,
    side_files_from: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write parameters in memory as one of our folders, whole or not at all.

    Args:
      params: by our names, in either layout.
      side_files_from: a checkpoint folder (Hugging Face's or ours) whose tokenizer, processor and
        other files go along; its config.json as well where it describes this model. Names and order
        of the tensors on export follow it.

    Raises:
      InfiniteVLError: the names or shapes are not those of `config`; the destination is taken; the
        disk is full.
    """
    from infinitevl_jax.checkpoints.array_writer import layers_of, write_arrays

    shapes = {name: tuple(value.shape) for name, value in params.items()}
    layouts = [leaves(config, scanned=scanned) for scanned in (True, False)]
    stored = next((x for x in layouts if {leaf.name for leaf in x} == shapes.keys()), layouts[0])
    complain(
        {leaf.name: leaf.shape for leaf in stored},
        shapes,
        "the model in memory",
        "its configuration",
    )
    dtypes = {name: np.dtype(value.dtype) for name, value in params.items()}
    if strange := [name for name, dtype in dtypes.items() if dtype not in FLOATS]:
        raise InfiniteVLError(
            f"parameter {strange[0]} is {dtypes[strange[0]]}", "weights are bf16, f16 or f32"
        )
    arrays = [array for leaf in stored for array in layers_of(params[leaf.name], leaf.layers)]
    needs = sum(array.nbytes for array in arrays)
    side = None if side_files_from is None else Path(side_files_from)
    with new_folder(
        folder, overwrite=overwrite, inputs=() if side is None else (side,), needs=needs
    ) as work:
        same = side is not None and (side / "config.json").exists() and read_config(side) == config
        if side is not None:
            copy_side_files(side, work, skip=() if same else ("config.json",))
        if not same:
            spelled = dtypes["norm.weight"].name
            (work / "config.json").write_text(
                json.dumps(to_huggingface(config) | {"torch_dtype": spelled}, indent=2) + "\n"
            )
        own = {torch: dtypes[leaf.name] for leaf in stored for torch in leaf.torch}
        own |= {head_name(config): own.get(head_name(config), own[embedding_name(config)])}
        _manifest(side, config).stored_as(own).write(work)
        write_arrays(work, PARAMS, arrays)


def run_manifest(folder: Path, config: ModelConfig) -> Manifest:
    """The manifest of what is trained from the weights of `folder`: a stack of layers has one
    dtype, and new numbers."""
    manifest = _manifest(folder, config)
    own = manifest.dtypes
    stacks = [leaf.torch for leaf in leaves(config, scanned=True)] if own else []
    kinds = {name: common([own[name] for name in stack]) for stack in stacks for name in stack}
    return manifest.stored_as(own | kinds)


def _manifest(side: Path | None, config: ModelConfig) -> Manifest:
    tied = config.text.tie_word_embeddings
    names = {name for leaf in leaves(config, scanned=False) for name in leaf.torch}
    if side is not None and is_ours(side):
        manifest = msgspec.structs.replace(Manifest.read(side), lora=None)  # read merged
    elif side is not None and any((*side.glob("*.safetensors"), *side.glob("pytorch_model*.bin"))):
        manifest = Manifest.of(open_source(side), tied)
    else:
        return Manifest(tie_word_embeddings=tied)
    return (
        manifest
        if names == manifest.dtypes.keys() - ({head_name(config)} - names)
        else Manifest(tie_word_embeddings=tied)
    )
