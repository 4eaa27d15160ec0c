"""One process at a time: a lock of the operating system, which ends with the process that holds it,
however that ends."""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.writing import storage


class Lock(contextlib.AbstractContextManager):
    """Held from its construction to `close`, or to the end of the process.

    It lies on the file, not on its name: links to the folder lead to the same lock, and a file that
      is left behind is not locked.
    The file says who took it last.
    """

    def __init__(self, path: Path, what: str, *, wait: bool = False):
        """
        Args:
          path: the lock's file, made where there is none. what: it guards, for messages.
          wait: for the other process, rather than refuse.

        Raises InfiniteVLError, naming the holder, if another process holds it; StorageError if the
        file cannot be locked.
        """
        self.path = path
        with storage(path):
            # not inherited: a helper process that outlives this one must not keep the lock
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
        """Raise InfiniteVLError if the file was removed or replaced: then another process may hold
        a lock of the same name."""
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
        """Let go."""
        os.close(self._file)

    def __exit__(self, *exception) -> None:
        self.close()
