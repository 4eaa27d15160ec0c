"""Which files of a checkpoint folder go along unchanged."""

import shutil
from pathlib import Path

from infinitevl_jax.reading import inside

MANIFEST = "infinitevl_jax.json"
PARAMS = "params"
FROZEN = "frozen"  # of a step of training: parameters that do not train
_WEIGHTS = tuple(
    ".safetensors .bin .pt .pth .ckpt .h5 .msgpack .onnx .gguf .safetensors.index.json"
    " .bin.index.json".split()
)
# An adapter is merged, and must not be found and merged again; the last two are orbax's.
_OWN = (MANIFEST, "adapter_config.json", "_CHECKPOINT_METADATA", "commit_success.txt")
_SIDE_FOLDERS = ("additional_chat_templates",)


def is_ours(folder: Path) -> bool:
    """Whether a folder is one of ours (else it is taken for Hugging Face's)."""
    return (folder / MANIFEST).exists()


def side_files(folder: Path) -> list[Path]:
    """Paths, relative to `folder`, of everything that belongs to a checkpoint and is not weights.

    These are configuration, code, tokenizer and processor files. Raises InfiniteVLError where one
    is a link that leads out of the folder.
    """
    places = [folder, *(folder / name for name in _SIDE_FOLDERS)]
    found = [
        path for place in places if place.is_dir() for path in place.iterdir() if path.is_file()
    ]
    names = [
        path.relative_to(folder)
        for path in found
        if not path.name.startswith(".")
        and path.name not in _OWN
        and not path.name.endswith(_WEIGHTS)
    ]
    for name in names:
        inside(folder, str(name))
    return sorted(names)


def copy_side_files(src: Path, dst: Path, skip: tuple[str, ...] = ()) -> None:
    """Copy `side_files` byte for byte."""
    for path in side_files(src):
        if str(path) not in skip:
            (dst / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(src / path, dst / path)
