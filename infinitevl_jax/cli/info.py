"""Text of `infinitevl info`. It reads headers, not weights."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from infinitevl_jax.checkpoints import read_config
from infinitevl_jax.checkpoints.files import is_ours
from infinitevl_jax.checkpoints.load import own_dtypes
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.checkpoints.source import open_source
from infinitevl_jax.checkpoints.weights import leaves, match
from infinitevl_jax.config.model import SLIDING, ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.mixers import layer_type
from infinitevl_jax.nn.params import cache_spec
from infinitevl_jax.processing import ChatTemplate, Tokenizer
from infinitevl_jax.serve.infinitevl import compute_dtype

LENGTHS = (1_000, 100_000)


def describe(folder: Path) -> dict:
    """Describe a checkpoint folder, or the newest step of a training run, for JSON.

    Raises:
      InfiniteVLError: the folder is damaged or of an unknown family.
    """
    folder = checkpoint_folder(folder)
    config = read_config(folder)
    text, vision = config.text, config.vision
    dtypes = _dtypes(folder, config)
    parts = _parts(config, dtypes)
    dtype = compute_dtype(dtypes["model.norm.weight"])
    return {
        "folder": str(folder),
        "kind": "ours" if is_ours(folder) else "Hugging Face",
        "family": config.family,
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
            else {"blocks": vision.depth, "hidden": vision.hidden_size, "patch": vision.patch_size}
        ),
        "head": "tied to the embeddings" if text.tie_word_embeddings else "its own",
        "parts": parts,
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        **_words(folder, config),
        "cache": {
            "dtype": dtype.name,
            "formula": cache_formula(config, dtype),
            "bytes": {
                str(length): cache_spec(config, 1, length, dtype).nbytes for length in LENGTHS
            },
        },
    }


def _dtypes(folder: Path, config: ModelConfig) -> dict[str, np.dtype]:
    """Torch name -> dtype of every tensor, checked against the configuration."""
    if not is_ours(folder):
        source = open_source(folder)
        match(config, source.shapes, str(folder))
        return {name: source.dtype(name) for name in source.names}
    from infinitevl_jax.checkpoints.orbax_store import Store

    stored, store, manifest = leaves(config, scanned=True), Store(folder), Manifest.read(folder)
    store.check(stored, str(folder / "config.json"))
    pairs = [
        zip(leaf.torch, own_dtypes(leaf, store.dtypes[leaf.name], manifest.dtypes), strict=True)
        for leaf in stored
    ]
    return {name: dtype for pair in pairs for name, dtype in pair}


def _parts(config: ModelConfig, dtypes: dict[str, np.dtype]) -> dict[str, dict]:
    """Parameters, bytes (in the tensors' own dtypes) and parameters per dtype of each part."""
    groups = [layer_type(kind).group for kind in dict.fromkeys(config.text.layer_types)]
    order = ("vision tower", "vision merger", "embeddings", *groups, "MLPs", "norms", "head")
    parts = {name: Counter() for name in order}
    for leaf in leaves(config, scanned=False):
        parts[_part(leaf.name, config)][dtypes[leaf.torch[0]]] += leaf.size
    return {
        name: {
            "parameters": sum(sizes.values()),
            "bytes": sum(dtype.itemsize * size for dtype, size in sizes.items()),
            "dtypes": {dtype.name: size for dtype, size in sizes.items()},
        }
        for name, sizes in parts.items()
        if sizes
    }


def _part(name: str, config: ModelConfig) -> str:
    fields = name.split(".")
    if fields[0] == "visual":
        return "vision merger" if fields[1] == "merger" else "vision tower"
    if fields[0] == "layers" and fields[2] == "self_attn":
        return layer_type(config.text.layer_types[int(fields[1])]).group
    if fields[0] == "layers" and fields[2] == "mlp":
        return "MLPs"
    return {"embed_tokens": "embeddings", "lm_head": "head"}.get(fields[0], "norms")


def _words(folder: Path, config: ModelConfig) -> dict:
    """Tokenizer, template and special ids. A missing or unsuitable tokenizer is not an error."""
    ids = {"pad": config.pad_token_id, "end": list(config.eos_token_ids)}
    if config.vision is not None:
        ids |= {
            name: getattr(config, f"{name}_token_id")
            for name in ("image", "video", "vision_start", "vision_end")
        }
    try:
        tokenizer = Tokenizer.from_folder(folder)
        source, ids["end"] = (
            f"{tokenizer.source}, {len(tokenizer):,} tokens",
            list(dict.fromkeys((*ids["end"], *tokenizer.eos_ids))),
        )
    except InfiniteVLError as error:
        source = f"none that fits: {error.culprit}"
    try:
        template = ChatTemplate.from_folder(folder).source
    except InfiniteVLError as error:
        template = f"none that can be read: {error.culprit}"
    return {"tokenizer": source, "template": template, "ids": ids}


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


def as_json(facts: dict) -> str:
    return json.dumps(facts, indent=2)


def as_table(facts: dict) -> str:
    """Format the facts as text."""
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
        "tokenizer": facts["tokenizer"],
        "template": facts["template"],
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
