"""Parameters into memory, onto one device or a mesh."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Sharding

from infinitevl_jax.checkpoints.dtypes import common, narrowed
from infinitevl_jax.checkpoints.files import is_ours
from infinitevl_jax.checkpoints.placing import place
from infinitevl_jax.checkpoints.reading import leaf_dtype, open_model, read_config, read_leaf
from infinitevl_jax.checkpoints.source import Source, check_finite
from infinitevl_jax.checkpoints.weights import Leaf, leaves
from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.stack import Scanned

Params = dict[str, jax.Array]


def load_params(
    folder: str | Path,
    *,
    scanned: Scanned,
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
      shardings: by parameter name. Each process reads only what its own devices need. Checksums
        are compared where that is a whole tensor.
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
    config = read_config(folder)
    return config, _from_stored(
        folder, config, _counted(leaves(config, scanned=scanned), progress), dtype, shardings
    )


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
        read = partial(read_leaf, source, leaf, dtype or leaf_dtype(source, leaf))
        out[leaf.name] = place(leaf.shape, shardings[leaf.name] if shardings else None, read)
    return out


def _from_stored(
    folder: Path,
    config: ModelConfig,
    wanted: Iterable[Leaf],
    dtype: np.dtype | None,
    shardings: Mapping[str, Sharding] | None,
) -> Params:
    """These leaves out of one of our folders."""
    # needs TensorStore, which Hugging Face folders do without
    from infinitevl_jax.checkpoints.stored import open_params, read_stack

    reader, out = open_params(folder, config), {}
    for leaf in wanted:
        kind = dtype or common([reader.dtypes[name] for name in leaf.layers])

        def convert(name: str, value: np.ndarray, kind: np.dtype = kind) -> np.ndarray:
            check_finite(value, f"{reader.path}: {name}")
            return value.astype(kind) if dtype else narrowed(value, kind, name, folder)

        out[leaf.name] = place(
            leaf.shape,
            shardings[leaf.name] if shardings else None,
            partial(read_stack, reader, leaf.layers, leaf.shape, kind, convert=convert),
            whole=True,
        )
    return out
