"""`infinitevl info`, also called `infinitevl convert inspect`: a checkpoint and its processor."""

import json
from pathlib import Path
from typing import Any

from infinitevl_jax.checkpoints.inspect import as_table, inspect_folder
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import ChatTemplate, Tokenizer

__all__ = ["as_json", "as_table", "describe"]


def describe(folder: Path) -> dict[str, Any]:
    """Facts of a checkpoint folder, or of a training run's newest step, as JSON has them, with its
    tokenizer and chat template. A folder without a tokenizer that fits is still a checkpoint.

    Raises InfiniteVLError for a damaged folder or another family.
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
    """The facts for machines."""
    return json.dumps(facts, indent=2)
