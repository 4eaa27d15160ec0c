"""Frozen parameters on disk: written once in a run, and shared by its steps as hard links.

Each step is whole by itself: the bytes are there as long as one step has them. What damages a
shared file damages all steps that have it, so that it is read and compared with its checksums
before another step gets it.
"""

import os
import shutil
from pathlib import Path

from infinitevl_jax.checkpoints.array_reader import ArrayReader
from infinitevl_jax.checkpoints.checksums import FOLDER, checksum_files


def check_arrays(step: Path, item: str) -> None:
    """Read all arrays of STEP/ITEM. Raises InfiniteVLError where one is damaged or missing."""
    reader = ArrayReader(step, item)
    for name in reader.shapes:
        reader.read(name)


def share_arrays(step: Path, item: str, new: Path) -> None:
    """Give the folder `new` the arrays of STEP/ITEM and their checksums."""
    shutil.copytree(step / item, new / item, copy_function=_share)
    (new / FOLDER).mkdir(exist_ok=True)
    for path in checksum_files(step, item):
        _share(path, new / FOLDER / path.name)


def _share(old: str | Path, new: str | Path) -> None:
    try:
        os.link(old, new)
    except OSError:  # a file system without links, or with too many to this file
        shutil.copyfile(old, new)
