"""Parameters into memory, onto one device or a mesh, and back to disk: `load_params`,
`save_params`."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from infinitevl_jax.checkpoints.destination import new_folder
from infinitevl_jax.checkpoints.files import MANIFEST, copy_side_files, is_ours
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.reading import (
    common,
    leaf_dtype,
    open_model,
    read_config,
    read_leaf,
)
from infinitevl_jax.checkpoints.source import FLOATS, Source, check_finite, open_source
from infinitevl_jax.checkpoints.weights import Leaf, complain, embedding_name, head_name, leaves
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.huggingface import to_huggingface

Params = dict[str, jax.Array]


def load_params(
    folder: str | Path,
    *,
    scanned: bool,
    dtype=None,
    shardings: Mapping[str, Sharding] | None = None,
    adapters: Sequence[str | Path] = (),
    progress: bool = False,
) -> tuple[ModelConfig, Params]:
    """Configuration and parameters of a checkpoint folder: Hugging Face's (config.json and weights
    are enough) or ours.

    Args:
      scanned: the layout, equal layers stacked (training) or each on its own (inference).
      dtype: cast floating-point tensors to this; None keeps each tensor's own.
      shardings: by parameter name. Each device reads only its own part of each tensor.
      adapters: PEFT LoRA folders to merge (a Hugging Face folder that holds one has it merged
        without asking).
      progress: show a bar (on a terminal).

    Raises:
      InfiniteVLError: damaged, missing, extra, misshapen or non-finite tensors; a configuration
        that is not supported.
    """
    folder = Path(folder)
    dtype = None if dtype is None else np.dtype(dtype)
    if not is_ours(folder):
        config, source = open_model(folder, adapters)
        return config, from_source(
            source, _counted(leaves(config, scanned=scanned), progress), dtype, shardings
        )
    if adapters:
        raise InfiniteVLError(
            f"{folder} is already converted; adapters are merged on import",
            "import the base model with --adapter",
        )
    return _from_ours(folder, scanned, dtype, shardings, progress)


def _counted(wanted: Sequence[Leaf], progress: bool) -> Iterator[Leaf]:
    """The leaves, with a bar that moves on as they have been read."""
    if not progress:
        yield from wanted
        return
    from tqdm import tqdm

    with tqdm(
        total=sum(leaf.size for leaf in wanted),
        unit=" parameters",
        unit_scale=True,
        desc="load",
        disable=None,
    ) as bar:
        for leaf in wanted:
            yield leaf
            bar.update(leaf.size)


def from_source(
    source: Source, wanted: Iterable[Leaf], dtype, shardings: Mapping[str, Sharding] | None
) -> Params:
    """These leaves out of torch tensors."""
    out = {}
    for leaf in wanted:
        kind = dtype or leaf_dtype(source, leaf)
        if shardings is None:
            out[leaf.name] = jnp.asarray(read_leaf(source, leaf, kind))
            continue
        once: dict[str, np.ndarray] = {}  # replicas of a part are read once

        def part(index, leaf=leaf, kind=kind, once=once):
            if str(index) not in once:
                once[str(index)] = read_leaf(source, leaf, kind, index)
            return once[str(index)]

        out[leaf.name] = jax.make_array_from_callback(leaf.shape, shardings[leaf.name], part)
    return out


def _from_ours(
    folder: Path, scanned: bool, dtype, shardings: Mapping[str, Sharding] | None, progress: bool
) -> tuple[ModelConfig, Params]:
    from infinitevl_jax.checkpoints.orbax_store import (
        Store,
    )  # orbax takes its time to import, and Hugging Face folders do without

    config, manifest, store = read_config(folder), Manifest.read(folder), Store(folder)
    stored = leaves(config, scanned=True)
    store.check(stored, f"{folder / 'config.json'}")
    names = (
        {leaf.torch[0]: leaf.name for leaf in leaves(config, scanned=False)} if not scanned else {}
    )
    out: Params = {}
    for leaf in _counted(stored, progress):
        wanted = [names[torch] for torch in leaf.torch] if names else [leaf.name]
        own = (
            own_dtypes(leaf, store.dtypes[leaf.name], manifest.dtypes)
            if names
            else [store.dtypes[leaf.name]]
        )
        split = bool(names) and leaf.stacked
        if shardings is None:
            value = store.read(leaf.name)
            check_finite(value, f"{store.path}: {leaf.name}")
            for i, (name, kind) in enumerate(zip(wanted, own, strict=True)):
                part = value[i] if split else value
                out[name] = jnp.asarray(
                    part.astype(dtype) if dtype else narrowed(part, kind, leaf.torch[i], folder)
                )
            continue
        held: dict[
            Sharding, dict[str, np.ndarray]
        ] = {}  # index within a layer -> the local shard of the whole stack
        for i, (name, kind) in enumerate(zip(wanted, own, strict=True)):
            target = shardings[name]
            if split and target in held:
                parts = held[target]
            else:
                value = store.read(leaf.name, _stacked(target) if split else target, dtype)
                parts = {
                    str(shard.index[split:]): np.asarray(shard.data)
                    for shard in value.addressable_shards
                }
                for part in parts.values():
                    check_finite(part, f"{store.path}: {leaf.name}")
                held[target] = parts

            def layer(index, i=i, parts=parts, kind=kind, leaf=leaf):
                part = parts[str(index)][i]
                return part.astype(dtype) if dtype else narrowed(part, kind, leaf.torch[i], folder)

            out[name] = (
                jax.make_array_from_callback(leaf.shape[1:], target, layer) if split else value
            )
    return config, out


def _stacked(sharding: Sharding) -> Sharding:
    """The sharding of a stack of arrays that are sharded like this; the stack's own axis stays
    whole."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
    return sharding


def own_dtypes(leaf: Leaf, stored: np.dtype, source: Mapping[str, np.dtype]) -> list[np.dtype]:
    """dtype of each tensor behind a stored leaf: the source's where the stack had to widen it, else
    the leaf's."""
    dtypes = [source.get(name, stored) for name in leaf.torch]
    return dtypes if common(dtypes) == stored else [stored] * len(dtypes)


def narrowed(value: np.ndarray, dtype: np.dtype, name: str, folder: Path) -> np.ndarray:
    """`value` in the dtype that the manifest of `folder` gives the torch tensor `name`;
    InfiniteVLError if it loses digits."""
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        out = value.astype(dtype)
    if not np.array_equal(out.astype(value.dtype), value):
        raise InfiniteVLError(
            f"{folder / MANIFEST} says that {name} is {dtype}, which cannot hold the values that"
            " are stored for it",
            "the manifest is damaged or belongs to other weights: import or save the model again",
        )
    return out


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
    from infinitevl_jax.checkpoints.orbax_store import Deferred, write_params

    stored, single = leaves(config, scanned=True), leaves(config, scanned=False)
    shapes = {name: tuple(value.shape) for name, value in params.items()}
    unrolled = shapes.keys() == {leaf.name for leaf in single}
    complain(
        {leaf.name: leaf.shape for leaf in (single if unrolled else stored)},
        shapes,
        "the model in memory",
        "its configuration",
    )
    whole = all(getattr(value, "is_fully_addressable", True) for value in params.values())
    names = {leaf.torch[0]: leaf.name for leaf in single}

    def load(leaf: Leaf, dtype) -> np.ndarray:
        if not unrolled or not leaf.stacked:
            return np.asarray(params[leaf.name if not unrolled else names[leaf.torch[0]]])
        return np.stack([np.asarray(params[names[torch]]).astype(dtype) for torch in leaf.torch])

    tree = {}
    for leaf in stored:
        dtype = common(
            [
                np.dtype(params[names[torch] if unrolled else leaf.name].dtype)
                for torch in leaf.torch
            ]
        )
        if dtype not in FLOATS:
            raise InfiniteVLError(
                f"parameter {leaf.name} is {dtype}", "weights are bf16, f16 or f32"
            )
        tree[leaf.name] = (
            Deferred(leaf.shape, dtype, functools.partial(load, leaf, dtype))
            if whole
            else params[leaf.name]
        )
    needs = sum(leaf.nbytes for leaf in tree.values())
    side = None if side_files_from is None else Path(side_files_from)
    with new_folder(
        folder, overwrite=overwrite, inputs=() if side is None else (side,), needs=needs
    ) as work:
        same = side is not None and (side / "config.json").exists() and read_config(side) == config
        if side is not None:
            copy_side_files(side, work, skip=() if same else ("config.json",))
        if not same:
            spelled = np.dtype(tree["norm.weight"].dtype).name
            (work / "config.json").write_text(
                json.dumps(to_huggingface(config) | {"torch_dtype": spelled}, indent=2) + "\n"
            )
        manifest = _manifest(side, config)
        if unrolled:
            own = {torch: params[name].dtype for torch, name in names.items()}
        else:
            own = {torch: tree[leaf.name].dtype for leaf in stored for torch in leaf.torch}
        manifest.stored_as({head_name(config): own[embedding_name(config)]} | own).write(work)
        write_params(work, tree)


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
        manifest = Manifest.read(side)
    elif side is not None and any((*side.glob("*.safetensors"), *side.glob("pytorch_model*.bin"))):
        manifest = Manifest.of(open_source(side), tied)
    else:
        return Manifest(tie_word_embeddings=tied)
    return (
        manifest
        if names == manifest.dtypes.keys() - ({head_name(config)} - names)
        else Manifest(tie_word_embeddings=tied)
    )
