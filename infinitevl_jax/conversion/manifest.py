"""infinitevl_jax.json: what export needs to give back the source tensor by tensor."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from infinitevl_jax.conversion.files import MANIFEST
from infinitevl_jax.conversion.safetensors_file import DTYPES, SPELLED
from infinitevl_jax.conversion.source import Source
from infinitevl_jax.conversion.weights import PUBLISHED, published
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import read_json

FORMAT = 2  # 1 stacked the layers at equal places of a period; 2 all equal neighbours together


@dataclass(frozen=True)
class Manifest:
    """Where the weights came from.

    Attributes:
      spelling: of the names on disk, "published" or "live".
      tie_word_embeddings: whether the head is the embedding (None: as config.json says).
      files: [{"name": file name, "metadata": {...}, "tensors": [[torch name, dtype], ...]}] in the order of the bytes; empty for
        a model that was born here.
      index_metadata: the metadata of model.safetensors.index.json, None where there was none.
      adapters: names of the LoRA adapters that were merged on import.
    """

    spelling: str = PUBLISHED
    tie_word_embeddings: bool | None = None
    files: Sequence[Mapping[str, Any]] = ()
    index_metadata: Mapping[str, Any] | None = None
    adapters: Sequence[str] = ()
    format: int = FORMAT

    @classmethod
    def of(cls, source: Source, tied: bool, adapters: Sequence[str] = ()) -> "Manifest":
        """The manifest of a folder that is being imported; torch files will be safetensors after export."""
        files = [
            {
                "name": file.path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors"),
                "metadata": file.metadata if file.path.suffix == ".safetensors" else {"format": "pt"},
                "tensors": [[name, SPELLED[entry.dtype]] for name, entry in file.entries.items()],
            }
            for file in source.files
        ]
        return cls(source.spelling, tied, files, source.index_metadata, list(adapters))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of one of our folders."""
        path = folder / MANIFEST
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise InfiniteVLError(
                f"{path} has format {content.get('format')!r}, this version reads {FORMAT}",
                "import the Hugging Face folder again, or use the version that wrote it",
            )
        if unknown := sorted(set(content) - {f.name for f in dataclasses.fields(cls)}):
            raise InfiniteVLError(f"{path} has the unknown keys {', '.join(unknown)}", "use the version that wrote it")
        try:
            manifest = cls(**content)
            _ = manifest.dtypes, [(file["name"], file["metadata"]) for file in manifest.files]
        except (KeyError, TypeError, ValueError) as error:
            raise InfiniteVLError(f"{path} is damaged: {error!r}", "import the Hugging Face folder again") from None
        return manifest

    def write(self, folder: Path) -> None:
        """Write it into a folder under construction."""
        (folder / MANIFEST).write_text(json.dumps(vars(self), separators=(",", ":")) + "\n", encoding="utf-8")

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Published name -> dtype in the source."""
        return {published(name): DTYPES[dtype] for file in self.files for name, dtype in file["tensors"]}
