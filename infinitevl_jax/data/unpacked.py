"""Packed files, unpacked into temporary ones that all processes read."""

import lzma
import os
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import open_file
from infinitevl_jax.writing import storage

LIMIT = 1 << 30  # largest .xz file in bytes, unpacked
BLOCK = 1 << 20  # bytes unpacked at a time

_open: weakref.WeakValueDictionary[tuple, "Unpacked"] = weakref.WeakValueDictionary()


class Unpacked:
    """An .xz file, unpacked. The temporary file goes with this object, or when the process ends.

    Copies in other processes read the same file, and do not remove it.

    Attributes:
      path: of the unpacked file.
    """

    def __init__(self, file: Path):
        """
        Raises:
          InfiniteVLError: it cannot be read, is damaged or too large, or the disk is full.
        """
        cure = "TMPDIR=FOLDER names another folder for temporary files"
        with storage(None, cure, called="the folder for temporary files"):
            handle, name = tempfile.mkstemp(prefix="infinitevl-")
        self.path = Path(name)
        remove = weakref.finalize(self, _remove, self.path, os.getpid())
        try:
            with storage(self.path, cure), open(handle, "wb") as whole, open_file(file) as packed:
                _unpack(file, lzma.LZMAFile(packed), whole)
        except BaseException:
            remove()
            raise


def unpack(file: Path) -> Unpacked:
    """A file unpacked. While it is in use, the same file is not unpacked again."""
    with open_file(file) as packed:
        found = os.fstat(packed.fileno())
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    unpacked = _open.get(key)
    if unpacked is None:
        unpacked = _open[key] = Unpacked(file)
    return unpacked


def _unpack(file: Path, packed: lzma.LZMAFile, whole: BinaryIO) -> None:
    size = 0
    while True:
        try:
            block = packed.read(BLOCK)
        except (lzma.LZMAError, EOFError, OSError) as error:
            raise InfiniteVLError(
                f"{file} is not a whole .xz file: {error}", "copy it again"
            ) from None
        if not block:
            return
        size += len(block)
        if size > LIMIT:
            raise InfiniteVLError(
                f"{file} has more than {LIMIT:,} bytes unpacked", "unpack it: xz -d"
            )
        whole.write(block)


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # not in a fork
        path.unlink(missing_ok=True)
