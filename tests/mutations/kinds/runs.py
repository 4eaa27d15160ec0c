"""A data set, a preset and a finished run that the kinds mutate."""

from pathlib import Path

from tiny_run import PRESET, prepare_tiny_vqa

from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.train.loop import train

from ..case import Place

# Two layers and two steps; nothing held out: a run that has ended compiles nothing when it is
# started again.
TEXT = (
    PRESET.replace(', "sliding_attention", "linear_attention"]', "]")
    .replace("depth = 2", "depth = 1")
    .replace("indexes = [1]", "indexes = [0]")
)
TEXT = (
    TEXT.replace("steps = 6", "steps = 2")
    .replace("checkpoint_every = 2", "checkpoint_every = 1")
    .replace('held_out = "train[75%:]"', 'held_out = ""')
)


def data(place: Place) -> Path:
    def write(folder: Path) -> None:
        folder.mkdir()
        prepare_tiny_vqa(folder)

    return place.original("data", write)


def preset(place: Place, output: Path, text: str = TEXT) -> str:
    """TOML of the run, with its folders."""
    text = text.replace("[train]\n", f'[train]\noutput = "{output}"\n')
    return text.replace("[train.data]\n", f'[train.data]\nfolder = "{data(place)}"\n')


def finished(place: Place) -> Path:
    """The folder of a run that has ended."""

    def write(folder: Path) -> None:
        path = folder.with_suffix(".toml")
        path.write_text(preset(place, folder))
        train(load_preset(path))
        path.unlink()

    return place.original("run", write)
