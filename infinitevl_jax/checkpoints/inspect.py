"""What a checkpoint folder is, from headers alone."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from infinitevl_jax.checkpoints.files import is_ours
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.reading import open_model, read_config
from infinitevl_jax.checkpoints.weights import count, head_name
from infinitevl_jax.config.model import SLIDING, ModelConfig
from infinitevl_jax.errors import quoted
from infinitevl_jax.nn.params import cache_spec


@dataclass(frozen=True)
class Description:
    """Facts of a checkpoint.

    Attributes:
      parameters: a tied head counted once.
      tensors, nbytes: on disk.
      dtypes: dtype -> parameters.
      names: spelling of the torch names.
      cache_bytes: of one sequence in bf16, as a function of its length: (fixed, for each token).
    """

    folder: Path
    config: ModelConfig
    kind: str
    parameters: int
    tensors: int
    nbytes: int
    dtypes: dict[str, int]
    names: str
    cache_bytes: tuple[int, int]

    def __str__(self) -> str:
        text, vision = self.config.text, self.config.vision
        kinds = Counter(text.layer_types)
        layers = ", ".join(
            f"{kinds[k]} {k}" + (f" (window {text.sliding_window})" if k == SLIDING else "")
            for k in kinds
        )
        fixed, growing = self.cache_bytes
        cache = " + ".join(
            [f"{fixed:,} bytes ({fixed / 2**20:.1f} MiB)"] * bool(fixed)
            + [f"{growing:,} bytes a token"] * bool(growing)
        )
        dtypes = ", ".join(f"{dtype} {n:,}" for dtype, n in sorted(self.dtypes.items()))
        lines = {
            "folder": f"{self.folder} ({self.kind})",
            "family": self.config.family,
            "layers": f"{text.num_hidden_layers}: {layers}",
            "vision": f"{vision.depth} blocks, width {vision.hidden_size}" if vision else "none",
            "widths": (
                f"hidden {text.hidden_size}, mlp {text.intermediate_size}, vocabulary"
                f" {text.vocab_size}"
            ),
            "head": "tied to the embedding" if text.tie_word_embeddings else "its own",
            "parameters": f"{self.parameters:,}",
            "on disk": f"{self.tensors} tensors, {self.nbytes:,} bytes",
            "dtypes": dtypes,
            "names": self.names,
            "cache": f"{cache} for a sequence, in bf16 with f32 states",
        }
        return "\n".join(f"{name:<12}{value}" for name, value in lines.items())


def inspect_folder(folder: str | Path) -> Description:
    """Describe a Hugging Face folder or one of ours; no weight is read.

    Raises:
      InfiniteVLError: the folder is damaged, or of a family that is not supported.
    """
    folder = Path(folder)
    if is_ours(folder):
        from infinitevl_jax.checkpoints.stored import open_params

        config, manifest = read_config(folder), Manifest.read(folder)
        reader = open_params(folder, config)
        sizes = [(reader.dtypes[name], math.prod(shape)) for name, shape in reader.shapes.items()]
        tied_on_disk = head_name(config) in manifest.dtypes
        kind = "ours" + (
            quoted(f", with adapters {', '.join(manifest.adapters)}") if manifest.adapters else ""
        )
        names = manifest.spelling
    else:
        config, source = open_model(folder)
        sizes = [(source.dtype(name), math.prod(shape)) for name, shape in source.shapes.items()]
        tied_on_disk, kind = head_name(config) in source.names, "Hugging Face"
        names = source.spelling
    names += ", with lm_head" if tied_on_disk else ", without lm_head"
    dtypes = Counter()
    for dtype, size in sizes:
        dtypes[dtype.name] += size
    long = 2**40  # tokens: beyond any window
    at, after = (cache_spec(config, 1, long + more, jnp.bfloat16).nbytes for more in (0, 1))
    growing = after - at
    fixed = at - long * growing
    nbytes = sum(dtype.itemsize * size for dtype, size in sizes)
    return Description(
        folder,
        config,
        kind,
        count(config),
        len(sizes),
        nbytes,
        dict(dtypes),
        names,
        (fixed, growing),
    )
