"""What a name of a model stands for: a model of the package, or a training run's newest
checkpoint."""

from pathlib import Path

from infinitevl_jax.checkpoints.files import is_ours
from infinitevl_jax.checkpoints.packaged import packaged_folder


def checkpoint_folder(folder: Path) -> Path:
    """The newest whole step of a run's folder (RUN/checkpoints/STEP), or the folder of a model that
    comes with the package, by its name; any other folder as it is.

    Raises InfiniteVLError for a model of the package that is not installed."""
    folder = packaged_folder(folder)
    if (folder / "config.json").exists():
        return folder
    steps = [
        path
        for path in folder.glob("checkpoints/*")
        if path.name.isdecimal() and is_ours(path) and (path / "config.json").exists()
    ]
    return max(steps, key=lambda path: int(path.name), default=folder)
