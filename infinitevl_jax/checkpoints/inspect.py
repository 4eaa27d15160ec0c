"""Description of a checkpoint folder. It reads headers, not weights."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infinitevl_jax.checkpoints.files import is_ours
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.reading import read_config
from infinitevl_jax.checkpoints.source import open_source
from infinitevl_jax.checkpoints.weights import head_name, leaves, match, tensor_name
from infinitevl_jax.config.model import SLIDING, ModelConfig
from infinitevl_jax.dtypes import compute_dtype
from infinitevl_jax.errors import quoted
from infinitevl_jax.nn.mixers import layer_type
from infinitevl_jax.nn.params import cache_spec

LENGTHS = (1_000, 100_000)  # tokens of a sequence whose cache is shown


@dataclass(frozen=True)
class Description:
    """Facts of a checkpoint.

    Attributes:
      kind: "ours", with the adapters merged into it, or "Hugging Face".
      names: spelling of the torch names, and whether there is a head.
      parts: part of the model -> dtype on disk -> parameters, a tied head counted once.
      dtype: default dtype of activations.
    """

    folder: Path
    config: ModelConfig
    kind: str
    names: str
    parts: dict[str, dict[np.dtype, int]]
    dtype: np.dtype

    @property
    def parameters(self) -> int:
        """All of them, a tied head counted once."""
        return sum(sum(sizes.values()) for sizes in self.parts.values())

    def facts(self) -> dict[str, Any]:
        """The description as JSON values."""
        config, text, vision = self.config, self.config.text, self.config.vision
        parts = {
            name: {
                "parameters": sum(sizes.values()),
                "bytes": sum(dtype.itemsize * size for dtype, size in sizes.items()),
                "dtypes": {dtype.name: size for dtype, size in sizes.items()},
            }
            for name, sizes in self.parts.items()
        }
        ids: dict[str, Any] = {"pad": config.pad_token_id, "end": list(config.eos_token_ids)}
        if vision is not None:
            ids |= {
                name: getattr(config, f"{name}_token_id")
                for name in ("image", "video", "vision_start", "vision_end")
            }
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "family": config.family,
            "names": self.names,
            "layers": dict(Counter(layer_type(kind).title for kind in text.layer_types)),
            "window": text.sliding_window if SLIDING in text.layer_types else None,
            "sizes": {
                "hidden": text.hidden_size,
                "mlp": text.intermediate_size,
                "vocabulary": text.vocab_size,
            },
            "vision": (
                None
                if vision is None
                else {
                    "blocks": vision.depth,
                    "hidden": vision.hidden_size,
                    "patch": vision.patch_size,
                }
            ),
            "head": "tied to the embeddings" if text.tie_word_embeddings else "its own",
            "parts": parts,
            "parameters": self.parameters,
            "bytes": sum(part["bytes"] for part in parts.values()),
            "ids": ids,
            "cache": {
                "dtype": self.dtype.name,
                "formula": cache_formula(config, self.dtype),
                "bytes": {
                    str(length): cache_spec(config, 1, length, self.dtype).nbytes
                    for length in LENGTHS
                },
            },
        }

    def __str__(self) -> str:
        return as_table(self.facts())


def inspect_folder(folder: str | Path) -> Description:
    """Describe a Hugging Face folder or one of ours.

    Raises:
      InfiniteVLError: the folder is damaged, or of a family that is not supported.
    """
    folder = Path(folder)
    config = read_config(folder)
    if is_ours(folder):
        manifest, kind = Manifest.read(folder), "ours"
        if manifest.adapters:
            kind += quoted(f", with adapters {', '.join(manifest.adapters)}")
        if manifest.lora:
            kind += f", with LoRA of rank {manifest.lora.rank}, merged when it is read"
        names, head = manifest.spelling, head_name(config) in manifest.dtypes
    else:
        source, kind = open_source(folder), "Hugging Face"
        names, head = source.spelling, head_name(config) in source.names
    dtypes = _dtypes(folder, config)
    return Description(
        folder,
        config,
        kind,
        f"{names}, {'with' if head else 'without'} lm_head",
        parts(config, dtypes),
        compute_dtype(dtypes[tensor_name(config, "norm.weight")]),
    )


def _dtypes(folder: Path, config: ModelConfig) -> dict[str, np.dtype]:
    """Torch name -> dtype of every tensor, checked against the configuration."""
    if not is_ours(folder):
        source = open_source(folder)
        match(config, source.shapes, str(folder))
        return {name: source.dtype(name) for name in source.names}
    from infinitevl_jax.checkpoints.stored import open_params  # orbax takes its time to import

    reader = open_params(folder, config)
    return {leaf.torch[0]: reader.dtypes[leaf.name] for leaf in leaves(config, scanned=False)}


def parts(config: ModelConfig, dtypes: dict[str, np.dtype]) -> dict[str, dict[np.dtype, int]]:
    """Part of the model -> dtype -> parameters."""
    groups = [layer_type(kind).group for kind in dict.fromkeys(config.text.layer_types)]
    order = ("vision tower", "vision merger", "embeddings", *groups, "MLPs", "norms", "head")
    found: dict[str, Counter[np.dtype]] = {name: Counter() for name in order}
    for leaf in leaves(config, scanned=False):
        found[_part(leaf.name, config)][dtypes[leaf.torch[0]]] += leaf.size
    return {name: dict(sizes) for name, sizes in found.items() if sizes}


def _part(name: str, config: ModelConfig) -> str:
    fields = name.split(".")
    if fields[0] == "visual":
        return "vision merger" if fields[1] == "merger" else "vision tower"
    if fields[0] == "layers" and fields[2] == "self_attn":
        return layer_type(config.text.layer_types[int(fields[1])]).group
    if fields[0] == "layers" and fields[2] == "mlp":
        return "MLPs"
    return {"embed_tokens": "embeddings", "lm_head": "head"}.get(fields[0], "norms")


def cache_formula(config: ModelConfig, dtype: np.dtype) -> str:
    """Bytes of one sequence's cache as a formula over the arrays of all layers."""
    # dimensions that differ between two lengths beyond any window grow with the sequence
    long, longer = (cache_spec(config, 1, 2**40 + more, dtype).layers for more in (0, 1))
    terms = Counter(_state_formula(*states) for states in zip(long, longer, strict=True))
    return " + ".join(f"{count} layers x ({term})" for term, count in terms.items())


def _state_formula(state: Any, longer: Any) -> str:
    """Bytes of one layer's state. `longer` is the state for one more token."""
    terms = []
    leaves = map(jax.tree_util.tree_leaves_with_path, (state, longer))
    for (path, leaf), (_, more) in zip(*leaves, strict=True):
        sizes = [
            str(size) if size == grown else "length"
            for size, grown in zip(leaf.shape[1:], more.shape[1:], strict=True)
        ]
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        term = f"{name} {' x '.join(sizes)} x {leaf.dtype.itemsize} bytes"
        terms.append(term.lstrip())
    return " + ".join(terms)


def as_table(facts: dict) -> str:
    """Format facts as text: `Description.facts()`, with or without tokenizer and template."""
    sizes, vision, cache = facts["sizes"], facts["vision"], facts["cache"]
    window = f" (window {facts['window']:,})" if facts["window"] else ""
    rows = {
        "folder": f"{facts['folder']} ({facts['kind']})",
        "family": facts["family"],
        "layers": (
            f"{sum(facts['layers'].values())}: "
            + ", ".join(f"{n} {kind}" for kind, n in facts["layers"].items())
            + window
        ),
        "widths": (
            f"hidden {sizes['hidden']:,}, MLP {sizes['mlp']:,}, vocabulary {sizes['vocabulary']:,};"
            f" head {facts['head']}"
        ),
        "vision": (
            f"{vision['blocks']} blocks, width {vision['hidden']:,}, patches of {vision['patch']}"
            " pixels"
            if vision
            else "none"
        ),
        "names": facts["names"],
        **{name: facts[name] for name in ("tokenizer", "template") if name in facts},
        "ids": ", ".join(
            f"{name} {' '.join(map(str, i)) if isinstance(i, list) else i}"
            for name, i in facts["ids"].items()
        ),
        "cache": f"for one sequence, activations in {cache['dtype']}:",
    }
    lines = [f"{name:<11}{value}" for name, value in rows.items()]
    terms = cache["formula"].replace(") + ", ") +\n")
    lines += [f"{'':<11}{term}" for term in terms.splitlines()]
    lines += [
        f"{'':<11}at {int(length):>7,} tokens: {size:,} bytes ({_human(size)})"
        for length, size in cache["bytes"].items()
    ]
    lines += ["", f"{'part':<24}{'parameters':>16}{'bytes':>18}   dtypes"]
    total = {"total": {"parameters": facts["parameters"], "bytes": facts["bytes"], "dtypes": {}}}
    for name, part in (facts["parts"] | total).items():
        dtypes = part["dtypes"]
        kinds = ", ".join(
            dtypes if len(dtypes) == 1 else [f"{dtype} {size:,}" for dtype, size in dtypes.items()]
        ) or _human(part["bytes"])
        lines.append(f"{name:<24}{part['parameters']:>16,}{part['bytes']:>18,}   {kinds}")
    return "\n".join(lines)


def _human(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
