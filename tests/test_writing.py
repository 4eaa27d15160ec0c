"""Disk errors name the file; files are written atomically."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.writing import StorageError, keep_aside, storage, write_text

FAILURES = {
    "full": (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        "no space left for out/x",
        "MB free",
    ),
    "quota": (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "no space left for out/x"),
    "file size": (OSError(errno.EFBIG, os.strerror(errno.EFBIG)), "no space left for out/x"),
    "orbax, full": (
        ValueError('RESOURCE_EXHAUSTED: Error writing "d/0": [OS error 28]\n' + "more\n" * 999),
        "no space left for out/x",
    ),
    "orbax, in words": (
        Exception("Write failed: No space left on device"),
        "no space left for out/x",
    ),
    "read-only": (
        OSError(errno.EROFS, os.strerror(errno.EROFS)),
        "out/x: Read-only file system",
        "permissions",
    ),
    "permission": (
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
        "out/x: Permission denied",
    ),
    "broken disk": (OSError(errno.EIO, os.strerror(errno.EIO)), "out/x: Input/output error"),
    "a NUL in the name": (ValueError("embedded null byte"), "out/x: embedded null byte"),
    "orbax, anything": (Exception("lost\nsecond line"), "out/x: lost"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_name_the_file(case):
    error, *parts = FAILURES[case]
    with pytest.raises(StorageError) as caught, storage("out/x"):
        raise error
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert str(caught.value).count("\n") == 1


def test_the_free_space_told_is_of_the_disk_that_is_full(tmp_path, monkeypatch):
    """Also where the message names the file in other words than its path."""
    free = {tmp_path: 7_000_000}  # bytes; no other place may be asked
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(StorageError) as caught, storage(tmp_path / "6/x", called="checkpoint 6"):
        raise full
    assert caught.value.culprit == "no space left for checkpoint 6, on a disk with 7.0 MB free"
    with pytest.raises(StorageError) as caught, storage(None, called="the temporary folder"):
        raise full
    assert caught.value.culprit == "no space left for the temporary folder"


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("a bug"), KeyboardInterrupt(), InfiniteVLError("a", "b")]
)
def test_what_is_no_failure_of_the_disk_passes(error):
    with pytest.raises(type(error)) as caught, storage("out/x"):
        raise error
    assert caught.value is error


def test_a_file_appears_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="no space left"):
        patch.setattr(os, "fsync", full)
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_kept_aside_under_the_first_free_name(tmp_path):
    for name in ("log.1.jsonl", "log.2.jsonl"):
        (tmp_path / "log.jsonl").write_text(name)
        assert (
            keep_aside(tmp_path / "log.jsonl") == tmp_path / name
            and (tmp_path / name).read_text() == name
        )
    assert sorted(os.listdir(tmp_path)) == ["log.1.jsonl", "log.2.jsonl"]
    (tmp_path / "4").mkdir()
    assert keep_aside(tmp_path / "4", tmp_path / "damaged-step-4") == tmp_path / "damaged-step-4"
    (tmp_path / "4").mkdir()
    assert keep_aside(tmp_path / "4", tmp_path / "damaged-step-4") == tmp_path / "damaged-step-4.1"
