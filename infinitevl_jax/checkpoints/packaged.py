"""Models that come with the package, by name: folders of `infinitevl_jax/models`."""

from pathlib import Path

from infinitevl_jax.errors import InfiniteVLError

MODELS = Path(__file__).resolve().parents[1] / "models"
TINY = "tiny"  # what a command without a model takes
NAMES = (TINY,)
LARGEST = 12 * 10**6  # bytes of a model's folder


def packaged_folder(folder: Path) -> Path:
    """The folder of a model of the package; any other path as it is.

    A folder of that name on this disk comes first.

    Raises:
      InfiniteVLError: the name is one of a model whose weights this installation lacks.
    """
    if str(folder) not in NAMES or folder.exists():
        return folder
    found = MODELS / folder
    if not (found / "config.json").exists():
        raise InfiniteVLError(
            f"this installation comes without weights of the model {str(folder)!r}",
            "name a checkpoint folder, such as one that you trained: infinitevl train"
            " infinitevl_tiny_teacher",
        )
    return found


def check_size(folder: Path) -> int:
    """Bytes of a model's folder.

    Raises:
      InfiniteVLError: they are too many for the package.
    """
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > LARGEST:
        raise InfiniteVLError(
            f"{folder} has {size:,} bytes, a model of the package at most {LARGEST:,}",
            "make the model smaller",
        )
    return size
