"""Worker processes of grain, which leave when their parent does."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import grain
from absl import flags

from infinitevl_jax.command import warn_in_one_line
from infinitevl_jax.errors import InfiniteVLError


def in_workers(rows: grain.IterDataset, workers: int, buffer: int) -> grain.IterDataset:
    """The same elements in the same order, made by processes.

    buffer: elements that wait in each of them.
    """
    if not flags.FLAGS.is_parsed():  # grain reads its own, also in programs without absl
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(workers, buffer)
    return rows.mp_prefetch(options, _Worker(os.getpid()))


def check_shared_memory(size: int, workers: int) -> None:
    """Raise InfiniteVLError unless /dev/shm, by which workers hand over rows, holds a few of them.

    Where it is full, a worker dies without a word.

    size: of a row, in bytes.
    """
    needed, folder = size * 4 * workers, Path("/dev/shm")
    if folder.is_dir() and (free := shutil.disk_usage(folder).free) < needed:
        raise InfiniteVLError(
            f"{workers} workers need {needed / 1e6:,.0f} MB of shared memory, /dev/shm has"
            f" {free / 1e6:,.0f} MB",
            "give the container more (docker run --shm-size=...), or lower train.data.workers",
        )


class _Worker:
    """Set-up of a worker process: it works until this process ends it, or has ended."""

    def __init__(self, parent: int):
        self.parent = parent

    def __call__(self, index: int, count: int) -> None:
        # sent to all processes of a terminal or a job; this process decides what they mean
        for name in ("SIGINT", "SIGHUP", "SIGTERM"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        warn_in_one_line()
        threading.Thread(target=self._watch, daemon=True, name="parent").start()

    def _watch(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(1)
        os._exit(1)
