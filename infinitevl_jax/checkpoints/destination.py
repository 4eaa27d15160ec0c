"""A folder that appears at its destination whole, or not at all, and never in the place of somebody
else's work."""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.interrupts import under_construction

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|old)-[a-z0-9_]{8}", re.DOTALL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def new_folder(
    dst: str | Path, *, overwrite: bool = False, inputs: tuple[Path, ...] = (), needs: int = 0
) -> Iterator[Path]:
    """A folder to write into that becomes `dst` when the block ends well, and leaves no trace when
    it does not.

    What a killed process left behind for the same `dst` is removed first, and named in the log.

    Args:
      dst: where the result goes; must not exist, be empty, or (with overwrite) be a checkpoint
        folder, which the new one replaces in one step. What appears there meanwhile is kept: the
        block then ends with an error.
      inputs: folders that are read meanwhile, which `dst` must not replace.
      needs: bytes that will be written, checked against the free space first.

    Raises:
      InfiniteVLError: `dst` is taken, or the disk is full.
    """
    dst = Path(os.path.abspath(dst))
    with contextlib.ExitStack() as stack:
        with _path_errors(dst):
            _check(dst, overwrite, inputs)
            stack.enter_context(_parents(dst))
            _clear_leftovers(dst)
            _check_replaceable(dst, dst, overwrite)
            _check_space(dst, needs)
            work, handle = _locked_folder(dst)
            stack.callback(os.close, handle)
            # After an exchange this is the old folder, after a rename nothing.
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            stack.enter_context(under_construction(work))
            work.chmod(0o755)
        with _full_disk_errors(dst, needs):
            yield work
            _sync(work)
            _publish(work, dst, overwrite)


@contextlib.contextmanager
def _path_errors(dst: Path) -> Iterator[None]:
    try:
        yield
    except InfiniteVLError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InfiniteVLError(
            f"{dst} cannot be created: {reason}", "check the path and its permissions"
        ) from None


@contextlib.contextmanager
def _full_disk_errors(dst: Path, needs: int) -> Iterator[None]:
    try:
        yield
    except InfiniteVLError:
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in _FULL  # orbax only quotes what the system said
        if not full and not any(os.strerror(code) in str(error) for code in _FULL):
            raise
        raise InfiniteVLError(
            f"no space left while writing {dst}"
            + (f", which needs {needs / 1e9:.2f} GB" if needs else ""),
            "free some space, or choose another disk; nothing was left behind",
        ) from error


def _check(dst: Path, overwrite: bool, inputs: tuple[Path, ...]) -> None:
    for source in inputs:
        source = source.resolve()
        if dst.resolve() == source or dst.resolve() in source.parents:
            raise InfiniteVLError(f"{dst} is the source, or holds it", "choose another destination")
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise InfiniteVLError(
            f"{dst} exists and is not a folder", "choose another destination, or move it away"
        )
    _check_replaceable(dst, dst, overwrite)


def _check_replaceable(found: Path, dst: Path, overwrite: bool) -> None:
    """Raise unless the folder `found`, which lies or lay at `dst`, is absent, empty, or a
    checkpoint to overwrite."""
    if not found.is_dir() or not any(found.iterdir()):
        return
    if not overwrite:
        raise InfiniteVLError(
            f"{dst} exists and is not empty",
            "choose another destination, or replace it with --overwrite",
        )
    if not (found / "config.json").exists():
        raise InfiniteVLError(
            f"{dst} is not a checkpoint folder: it will not be overwritten",
            "choose another destination, or empty it",
        )


@contextlib.contextmanager
def _parents(dst: Path) -> Iterator[None]:
    """Make the folders above `dst`; those that were missing go again if the block fails."""
    missing = [path for path in dst.parents if not path.exists()]
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()
        raise


def _check_space(dst: Path, needs: int) -> None:
    free = shutil.disk_usage(dst.parent).free
    if free >= needs:
        return
    left = [
        path for path in dst.parent.iterdir() if _LEFTOVER.fullmatch(path.name) and _is_dead(path)
    ]
    named = [
        f"; a killed conversion left {path} ({_bytes(path) / 1e9:.2f} GB)" for path in left[:5]
    ]
    raise InfiniteVLError(
        f"{dst} needs {needs / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there{''.join(named)}",
        "free some space, or choose another disk",
    )


# A folder under construction is locked by the process that fills it, for as long as that process
# lives.


def _locked_folder(dst: Path) -> tuple[Path, int]:
    """A fresh hidden folder beside `dst`, and the open handle that holds its lock."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{dst.name}.partial-", dir=dst.parent))
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            # Another process may have taken it for a leftover before it was locked.
            if _lock(handle) is not False and work.exists():
                return work, handle
            os.close(handle)


def _lock(handle: int) -> bool | None:
    """Whether the lock was free and is now ours; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of whatever folder has this name, once whoever holds it lets go."""
    while True:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(
                os.fstat(handle), os.stat(folder)
            ):  # else it was replaced meanwhile
                yield
                return
        finally:
            os.close(handle)


def _is_dead(folder: Path) -> bool | None:
    """Whether no process holds the lock of a folder under construction; None if that cannot be
    known."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _lock(handle)
    finally:
        os.close(handle)


def _clear_leftovers(dst: Path) -> None:
    """Remove what killed conversions to `dst` left, after putting back a folder that one had moved
    away."""
    for path in sorted(dst.parent.iterdir()):
        found = _LEFTOVER.fullmatch(path.name)
        if not found or found["name"] != dst.name:
            continue
        dead = _is_dead(path)
        if dead and found["kind"] == "old" and not dst.exists():
            os.rename(path, dst)
            _log.warning("%s was put back: a conversion was killed while replacing it", dst)
        elif dead:
            size = _bytes(path)
            shutil.rmtree(path, ignore_errors=True)
            _log.warning("removed %s (%.2f GB), left by a killed conversion", path, size / 1e9)
        elif dead is None:
            _log.warning(
                "%s may be left by a killed conversion: remove it if none is running", path
            )
        else:
            _log.warning("another conversion to %s is running, in %s", dst, path)


def _bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(root, name)).st_size
    return total


# Taking the place.


def _publish(work: Path, dst: Path, overwrite: bool) -> None:
    """`work` becomes `dst`. By POSIX a folder is renamed onto nothing or an empty folder only."""
    try:
        os.rename(work, dst)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if not dst.is_dir() or dst.is_symlink():
            raise InfiniteVLError(
                f"{dst} appeared meanwhile and is not a folder",
                "choose another destination, or move it away",
            ) from None
        with _locked(dst):  # what is moved away is no leftover while we look at it and remove it
            _check_replaceable(dst, dst, overwrite)
            if not _exchange(work, dst):
                _replace_in_two_steps(work, dst)
                return
            try:
                _check_replaceable(work, dst, overwrite)  # what really lay there at that moment
            except InfiniteVLError:
                _exchange(work, dst)
                raise
            _sync_folder(dst.parent)
            shutil.rmtree(work, ignore_errors=True)
    else:
        _sync_folder(dst.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders change places at once; False where the system or the file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(os.fsencode(a), os.fsencode(b), ctypes.c_uint(2))  # RENAME_SWAP
    elif hasattr(library, "renameat2"):
        here = ctypes.c_int(-100)  # AT_FDCWD; the paths are absolute
        failed = library.renameat2(
            here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(2)
        )  # RENAME_EXCHANGE
    else:
        return False
    if failed and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(b))
    return not failed


def _replace_in_two_steps(work: Path, dst: Path) -> None:
    """As an exchange; killed in between, the old folder is put back by the next conversion to
    `dst`."""
    old = Path(tempfile.mkdtemp(prefix=f".{dst.name}.old-", dir=dst.parent))
    try:
        os.rename(dst, old)
        os.rename(work, dst)
    except BaseException:
        if not dst.exists():
            os.rename(old, dst)
        raise
    _sync_folder(dst.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
