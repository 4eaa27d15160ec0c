"""Writing files atomically and durably, with errors that name the file."""

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from infinitevl_jax.errors import InfiniteVLError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SAYS_FULL = re.compile(
    "|".join([*(os.strerror(code) for code in _FULL), "RESOURCE_EXHAUSTED"]), re.IGNORECASE
)


class StorageError(InfiniteVLError):
    """A disk that is full, read-only or unreadable."""


@contextlib.contextmanager
def storage(path: Path | str | None, cure: str = "", *, called: str = "") -> Iterator[None]:
    """Context manager that turns I/O errors into StorageError.

    Args:
      path: what the block reads or writes; its disk is the one whose free space is told. None if
        unknown.
      cure: appended to the cure: what to do once the storage works again.
      called: how the message names it, if not by the path.
    """
    try:
        yield
    except InfiniteVLError:
        raise
    except Exception as error:  # orbax and tensorstore raise ValueError and bare Exception
        if not isinstance(error, OSError | ValueError) and type(error) is not Exception:
            raise
        raise failure(path, error, cure, called=called) from error


def failure(
    path: Path | str | None, error: Exception, cure: str = "", *, called: str = ""
) -> StorageError:
    """StorageError for an I/O error at `path`. Arguments as of `storage`."""
    name = called or path
    more = f"; {cure}" if cure else ""
    if getattr(error, "errno", None) in _FULL or _SAYS_FULL.search(str(error)):
        return StorageError(
            f"no space left for {name}"
            + ("" if path is None else f", on a disk with {_free(path)}"),
            f"free some space, or choose another disk{more}",
        )
    if isinstance(error, OSError) and error.strerror:
        return StorageError(
            f"{name}: {error.strerror}", f"check the path and its permissions{more}"
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return StorageError(f"{name}: {reason}", f"check the disk{more}")


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; it is on the disk when this returns."""
    aside = path.with_name(f".{path.name}.partial")
    with storage(path):
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def keep_aside(path: Path, to: Path | None = None) -> Path:
    """Rename a file or folder to a free name: `to`, or `to` with .1, .2, ... before the suffix.

    Returns:
      The new path.
    """
    to = to or path
    free, number = to, 0
    while os.path.lexists(free):
        number += 1
        free = to.with_name(f"{to.stem}.{number}{to.suffix}")
    os.rename(path, free)
    sync(free.parent)
    return free


def check_room(folder: Path, size: int) -> None:
    """Raise OSError unless a folder has room for `size` bytes, by allocating a temporary file."""
    if not hasattr(os, "posix_fallocate"):
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in _FULL:
                raise
            # a file system that cannot allocate: the write itself will tell


def megabytes(size: int) -> str:
    """Format a number of bytes."""
    return f"{size / 1e6:,.1f} MB"


def _free(path: Path | str) -> str:
    """Free space on the disk of `path`, as text."""
    path = Path(path)
    try:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        return f"{megabytes(shutil.disk_usage(there).free)} free"
    except OSError:
        return "an unknown size"
