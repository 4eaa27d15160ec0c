"""Code that goes along with an exported folder, so that transformers opens it
(trust_remote_code=True).

The modules beside this one are InfiniteVL's. They are copied, not imported: they need torch and
transformers.
"""

import importlib.resources
import json
from pathlib import Path

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.families import family
from infinitevl_jax.reading import read_json


def add_transformers_code(folder: Path, config: ModelConfig) -> None:
    """Add the family's code to a Hugging Face folder under construction, and name it in
    config.json.

    Nothing is done where transformers knows the model itself, or where the source brought code of
    its own or names code elsewhere.
    """
    code = family(config.family).transformers_code
    if code is None or any(folder.glob("*.py")):
        return
    path = folder / "config.json"
    content = read_json(path)
    named = content.get("auto_map") or {}
    if not isinstance(named, dict) or not named.items() <= code.auto_map.items():
        return
    package = importlib.resources.files(code.package)
    for name in code.modules:
        (folder / f"{name}.py").write_bytes(package.joinpath(f"{name}.py").read_bytes())
    # A head that no file holds is the embedding, whatever the source's config.json says.
    tied = config.text.tie_word_embeddings
    content |= {"auto_map": dict(code.auto_map), "tie_word_embeddings": tied}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
