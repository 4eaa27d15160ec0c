"""A lock has one holder, under any name of the folder, and ends with its holder."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.locking import Lock

ROOT = Path(__file__).resolve().parents[1]
HOLD = (
    "import sys, time\nfrom infinitevl_jax.locking import Lock\nlock ="
    " Lock(__import__('pathlib').Path(sys.argv[1]), 'it')\n"
)
HOLD += "print('held', flush=True)\ntime.sleep(60)"


def test_the_second_is_refused_and_told_who_holds_it(tmp_path):
    with Lock(tmp_path / ".lock", "the run in out"), pytest.raises(InfiniteVLError) as caught:
        Lock(tmp_path / ".lock", "the run in out")
    assert caught.value.culprit.startswith(f"the run in out is in use by process {os.getpid()} on ")
    assert "since 20" in caught.value.culprit
    Lock(tmp_path / ".lock", "the run in out").close()  # is free now


def test_a_link_leads_to_the_same_lock(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with Lock(tmp_path / "link" / ".lock", "it"), pytest.raises(InfiniteVLError, match="in use"):
        Lock(tmp_path / "real" / ".lock", "it")


def test_a_lock_ends_with_its_process(tmp_path):
    """A stale lock file does not lock."""
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InfiniteVLError, match=f"process {holder.pid} on"):
        Lock(path, "it")
    holder.send_signal(signal.SIGKILL)
    holder.communicate(timeout=30)
    assert f"process {holder.pid}" in path.read_text()
    Lock(path, "it").close()


def test_a_folder_that_is_replaced_is_no_longer_held(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with Lock(folder / ".lock", "it") as lock:
        lock.check()
        shutil.rmtree(folder)
        with pytest.raises(InfiniteVLError, match="removed or replaced"):
            lock.check()
        folder.mkdir()
        with (
            Lock(folder / ".lock", "it"),
            pytest.raises(InfiniteVLError, match="removed or replaced"),
        ):
            lock.check()


@pytest.mark.parametrize(
    "make", [lambda p: p.mkdir(), lambda p: p.symlink_to("/dev/null"), lambda p: p.parent.rmdir()]
)
def test_what_cannot_be_locked(tmp_path, make):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / ".lock"
    make(path)
    with pytest.raises(InfiniteVLError, match=".lock"):
        Lock(path, "it")
