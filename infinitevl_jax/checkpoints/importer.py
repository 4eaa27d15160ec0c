"""Hugging Face folder -> ours."""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from infinitevl_jax.checkpoints.array_writer import LazyArray, write_arrays
from infinitevl_jax.checkpoints.destination import new_folder
from infinitevl_jax.checkpoints.files import PARAMS, copy_side_files, is_ours
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.reading import leaf_dtype, open_model, read_leaf
from infinitevl_jax.checkpoints.weights import Leaf, leaves
from infinitevl_jax.errors import InfiniteVLError


def import_folder(
    src: str | Path,
    dst: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Convert a Hugging Face folder; memory holds one tensor at a time, or a few small ones,
    whatever the size of the model.

    Args:
      src: config.json with safetensors or .bin weights, sharded or single; a LoRA adapter beside
        them is merged.
      dst: our folder, which appears whole or not at all.
      adapters: more LoRA folders to merge, in this order.
      overwrite: replace a checkpoint folder at `dst`, once the new one is complete.
      progress: show a bar.

    Raises:
      InfiniteVLError: names the file, tensor or key that does not fit, and the cure.
    """
    src = Path(src)
    if is_ours(src):
        raise InfiniteVLError(
            f"{src} is already one of our folders",
            "import takes a Hugging Face folder; to go back, use export",
        )
    config, source = open_model(src, adapters)
    stored = leaves(config, scanned=False)
    merged = [adapter.folder.resolve().name for adapter in getattr(source, "adapters", ())]
    needs = sum(leaf_dtype(source, leaf).itemsize * leaf.size for leaf in stored)
    bar = tqdm(
        total=needs, unit="B", unit_scale=True, desc="import", disable=None if progress else True
    )  # on a terminal

    def lazy(leaf: Leaf) -> LazyArray:
        dtype = leaf_dtype(source, leaf)

        def load():
            value = read_leaf(source, leaf, dtype)
            bar.update(value.nbytes)
            return value

        return LazyArray(leaf.name, dtype.itemsize * leaf.size, load)

    with (
        bar,
        new_folder(
            dst, overwrite=overwrite, inputs=(src, *map(Path, adapters)), needs=needs
        ) as work,
    ):
        copy_side_files(src, work)
        Manifest.of(source, config.text.tie_word_embeddings, merged).write(work)
        write_arrays(work, PARAMS, map(lazy, stored))
