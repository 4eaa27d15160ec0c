"""Code of ours that goes along with an exported hybrid, so that transformers opens it
(trust_remote_code=True).

The modules beside this one are copied, not imported: they need torch and transformers.
"""

import importlib.resources
import json
from pathlib import Path

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.reading import read_json

_CONFIG, _MODEL = "configuration_infinitevl", "modeling_infinitevl"
_CLASS = f"{_MODEL}.InfiniteVLQwen2_5_VLForConditionalGeneration"
AUTO_MAP = {
    "AutoConfig": f"{_CONFIG}.InfiniteVLConfig",
    "AutoModel": _CLASS,
    "AutoModelForCausalLM": _CLASS,
    "AutoModelForImageTextToText": _CLASS,
}


def add_transformers_code(folder: Path, config: ModelConfig) -> None:
    """Add our code to a Hugging Face folder under construction, and name it in config.json.

    Nothing is done where transformers knows the model itself, or where the source brought code of
    its own or names code elsewhere.
    """
    path = folder / "config.json"
    content = read_json(path)
    named = content.get("auto_map") or {}
    foreign = not isinstance(named, dict) or any(
        AUTO_MAP.get(key) != value for key, value in named.items()
    )
    if config.family != "infinite_vl" or foreign or any(folder.glob("*.py")):
        return
    here = importlib.resources.files(__name__)
    for name in (_CONFIG, _MODEL):
        (folder / f"{name}.py").write_bytes(here.joinpath(f"{name}.py").read_bytes())
    # A head that no file holds is the embedding, whatever the source's config.json says.
    content |= {"auto_map": AUTO_MAP, "tie_word_embeddings": config.text.tie_word_embeddings}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
