"""infinitevl_jax.json: what export needs to give back the source tensor by tensor."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from infinitevl_jax.checkpoints.files import MANIFEST
from infinitevl_jax.checkpoints.safetensors_file import DTYPES, SPELLED
from infinitevl_jax.checkpoints.source import Source
from infinitevl_jax.checkpoints.weights import HUB, hub_name
from infinitevl_jax.config.lora import Alpha, Rank, lora_scale
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import plain_name, read_json, unknown_keys

# Of params/: 1 and 2 stacked equal layers, 1 those at equal places of a period, 2 all neighbours; 3
# has every layer by itself, and checksums; 4 may have parameters that do not train in frozen/.
FORMAT = 4
READ = (2, 3, 4)


class WeightFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A safetensors file of the source.

    Attributes:
      name: its plain name. metadata: its own dictionary.
      tensors: (torch name, dtype) in the order of the bytes.
    """

    name: str
    metadata: dict[str, str]
    tensors: tuple[tuple[str, Literal["BF16", "F16", "F32"]], ...]


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Adapters beside the kernels in params/, which are added when they are read.

    Attributes:
      rank, alpha, use_rslora: as in PEFT's adapter_config.json.
      base_trained: other weights were trained with them, so that they belong to no other base.
    """

    rank: Rank
    alpha: Alpha
    use_rslora: bool
    base_trained: bool

    @property
    def scale(self) -> float:
        """Factor of the adapters' product."""
        return lora_scale(self.rank, self.alpha, self.use_rslora)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the weights came from.

    Attributes:
      spelling: of the names on disk.
      tie_word_embeddings: whether the head is the embedding (None: as config.json says).
      files: of the source, in order; empty for a model that was born here.
      index_metadata: the metadata of model.safetensors.index.json, None where there was none.
      adapters: names of the LoRA adapters that were merged on import.
      lora: adapters in params/; None where there are none.
    """

    spelling: Literal["published", "live"] = HUB
    tie_word_embeddings: bool | None = None
    files: tuple[WeightFile, ...] = ()
    index_metadata: dict[str, Any] | None = None
    adapters: tuple[str, ...] = ()
    lora: Lora | None = None
    format: int = FORMAT

    @classmethod
    def of(cls, source: Source, tied: bool, adapters: Sequence[str] = ()) -> "Manifest":
        """The manifest of a folder that is being imported; torch files will be safetensors after
        export."""
        files = []
        for file in source.files:
            name = file.path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
            metadata = file.metadata if file.path.suffix == ".safetensors" else {"format": "pt"}
            tensors = tuple((raw, SPELLED[entry.dtype]) for raw, entry in file.entries.items())
            files.append(
                WeightFile(plain_name(name, str(source.folder), ".safetensors"), metadata, tensors)
            )
        return cls(
            spelling=source.spelling,
            tie_word_embeddings=tied,
            files=tuple(files),
            index_metadata=source.index_metadata,
            adapters=tuple(adapters),
        )

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of one of our folders. It may come from anybody: every name and type in it
        is checked."""
        path = folder / MANIFEST
        content = read_json(path)
        if content.get("format") not in READ:
            raise InfiniteVLError(
                f"{path} has format {content.get('format')!r}, this version reads"
                f" {READ[0]} to {READ[-1]}",
                "import the Hugging Face folder again, or use the version that wrote it",
            )
        if unknown := unknown_keys(content, cls):
            raise InfiniteVLError(
                f"{path} has the unknown keys {', '.join(unknown)}", "use the version that wrote it"
            )
        manifest = read_json(path, cls)
        names = [plain_name(file.name, str(path), ".safetensors") for file in manifest.files]
        _unique([name.lower() for name in names], path, "file")  # some file systems fold the case
        _unique(
            [hub_name(name) for file in manifest.files for name, _ in file.tensors], path, "tensor"
        )
        return manifest

    def write(self, folder: Path, format: int = FORMAT) -> None:
        """Write it into a folder under construction, whose arrays have this format."""
        content = msgspec.to_builtins(msgspec.structs.replace(self, format=format))
        if self.lora is None:  # a key that versions before LoRA do not know
            del content["lora"]
        (folder / MANIFEST).write_bytes(msgspec.json.encode(content) + b"\n")

    def stored_as(self, dtypes: Mapping[str, np.dtype]) -> "Manifest":
        """The same with these dtypes (by published name): of weights that are no longer the
        source's own."""
        files = tuple(
            msgspec.structs.replace(
                file,
                tensors=tuple((raw, SPELLED[dtypes[hub_name(raw)]]) for raw, _ in file.tensors),
            )
            for file in self.files
        )
        return msgspec.structs.replace(self, files=files)

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """Published name -> dtype in the source."""
        return {hub_name(raw): DTYPES[dtype] for file in self.files for raw, dtype in file.tensors}


def _unique(names: Sequence[str], path: Path, what: str) -> None:
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise InfiniteVLError(
            f"{path} names the {what} {twice[0]} twice", "import the Hugging Face folder again"
        )
