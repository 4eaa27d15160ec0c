"""File lock between processes. The operating system releases it when its process ends."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.writing import storage


class Lock(contextlib.AbstractContextManager):
    """An exclusive `flock`, held from construction to `close` or the end of the process.

    The lock belongs to the file, not to its name: links to the folder share it, and a stale file is
    not locked. The file names its last holder.
    """

    def __init__(self, path: Path, what: str, *, wait: bool = False):
        """Acquire the lock.

        Args:
          path: lock file; created if missing.
          what: name of the guarded thing, for errors.
          wait: wait for the other process instead of raising.

        Raises:
          InfiniteVLError: another process holds the lock; names it.
          StorageError: the file cannot be locked.
        """
        self.path = path
        with storage(path):
            # O_CLOEXEC: a child that outlives this process must not keep the lock
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                holder = os.pread(self._file, 300, 0).decode("utf-8", "replace").strip()
                os.close(self._file)
                raise InfiniteVLError(
                    f"{what} is in use by {holder or 'another process'}",
                    "wait until it has ended, stop it, or choose another folder",
                ) from None
            except BaseException:
                os.close(self._file)
                raise
            os.ftruncate(self._file, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(
                self._file,
                f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(),
                0,
            )

    def check(self) -> None:
        """Raise InfiniteVLError if the lock file was removed or replaced.

        Another process may then hold a lock of the same name.
        """
        try:
            found = os.stat(self.path)
        except OSError:
            found = None
        if found is None or not os.path.samestat(found, os.fstat(self._file)):
            raise InfiniteVLError(
                f"{self.path.parent} was removed or replaced while it was in use",
                "start again with another folder",
            )

    def close(self) -> None:
        """Release the lock."""
        os.close(self._file)

    def __exit__(self, *exception) -> None:
        self.close()
