"""A training run's folder stands for its newest checkpoint."""

from pathlib import Path

from infinitevl_jax.checkpoints.files import is_ours


def checkpoint_folder(folder: Path) -> Path:
    """The newest whole step of a run's folder (RUN/checkpoints/STEP); any other folder as it is."""
    if (folder / "config.json").exists():
        return folder
    steps = [
        path
        for path in folder.glob("checkpoints/*")
        if path.name.isdecimal() and is_ours(path) and (path / "config.json").exists()
    ]
    return max(steps, key=lambda path: int(path.name), default=folder)
