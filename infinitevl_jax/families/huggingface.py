"""Hugging Face's config.json <-> ModelConfig, of whichever family the file is.

A key that changes nothing is ignored. One that changes the maths must hold the value that this
package computes with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families.config_file import ConfigFile
from infinitevl_jax.families.family import family, family_names
from infinitevl_jax.reading import read_json


def read_config(folder: str | Path) -> ModelConfig:
    """The ModelConfig of a checkpoint folder: its config.json, and the end tokens of
    generation_config.json where there is one."""
    config, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    content = read_json(config)
    return model_config(
        content, str(config), read_json(generation) if generation.exists() else None
    )


def model_config(
    hf: Mapping[str, Any], source: str = "config.json", generation: Mapping[str, Any] | None = None
) -> ModelConfig:
    """ModelConfig of a Hugging Face configuration.

    Args:
      hf: config.json as a dictionary.
      source: name of the file, for messages.
      generation: generation_config.json, whose end and pad tokens win over config.json's.

    Raises:
      InfiniteVLError: a family that is not registered, a size that is missing, or a key that
        changes the maths.
    """
    name = hf.get("model_type")
    if name not in family_names():
        raise InfiniteVLError(
            f"{source}: model_type is {name!r}"
            + (f" (architectures {hf['architectures']})" if hf.get("architectures") else ""),
            f"this package reads the families {', '.join(family_names())}",
        )
    try:
        return family(name).read(ConfigFile(hf, source, generation))
    except InfiniteVLError as error:  # of the configuration classes, which know no file
        if error.culprit.startswith(source):
            raise
        raise InfiniteVLError(f"{source}: {error.culprit}", error.cure) from None


def to_huggingface(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model that was born here. `model_config` reads it back to an equal
    ModelConfig.

    Raises InfiniteVLError for a setting that the family cannot express.
    """
    return family(config.family).write(config)
