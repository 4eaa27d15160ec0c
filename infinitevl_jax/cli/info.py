"""Text of `infinitevl info` and `infinitevl convert inspect`. It reads headers, not weights."""

import json
from pathlib import Path
from typing import Any

from infinitevl_jax.checkpoints.inspect import as_table, inspect_folder
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import ChatTemplate, Tokenizer

__all__ = ["as_json", "as_table", "describe"]


def describe(folder: Path) -> dict[str, Any]:
    """Describe a checkpoint folder, or the newest step of a training run, for JSON.

    A missing or unsuitable tokenizer is not an error.

    Raises:
      InfiniteVLError: the folder is damaged or of an unknown family.
    """
    folder = checkpoint_folder(folder)
    facts = inspect_folder(folder).facts()
    ids = facts["ids"]
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
    return facts | {"tokenizer": source, "template": template}


def as_json(facts: dict[str, Any]) -> str:
    """Format facts as JSON."""
    return json.dumps(facts, indent=2)
