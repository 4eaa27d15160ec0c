"""A log continues after its valid lines; a damaged log is kept."""

import os

import pytest

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.train.log import Log, read_log

DAMAGED = {
    "a number": b"3\n",
    "a list": b"[1]\n",
    "no step": b'{"loss": 1}\n',
    "a step in words": b'{"step": "two"}\n',
    "true for a step": b'{"step": true}\n',
    "a list for a loss": b'{"step": 2, "loss": [1]}\n',
    "not UTF-8": b"\xff\xfe\n",
    "cut in the middle": b'{"step": 2, "lo\n',
    "nested too deep": b"[" * 100_000 + b"\n",
    "zeros of a lost block": b"\0" * 512 + b"\n",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_lines(tmp_path, said, case):
    path = tmp_path / "log.jsonl"
    content = (
        b'{"step": 1, "loss": 2.5}\n'
        + DAMAGED[case]
        + b'{"step": 3, "loss": 2.0}\n{"step": 9, "loss": 1}\n'
    )
    path.write_bytes(content)
    log = Log(path, 3)
    log.write(step=4, loss=1.5)
    log.close()
    assert [line["step"] for line in read_log(path)] == [1, 3, 4]
    assert said() == [
        f"1 damaged lines in {path}: it is kept as {tmp_path / 'log.1.jsonl'}, the others go on"
    ]
    assert (tmp_path / "log.1.jsonl").read_bytes() == content


def test_a_last_line_that_a_kill_cut_is_no_damage(tmp_path, said):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    Log(path, 5).close()
    assert (
        said() == []
        and path.read_bytes() == b'{"step": 1, "loss": 2.5}\n'
        and os.listdir(tmp_path) == ["log.jsonl"]
    )


def test_what_is_logged_can_be_asked(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    log.write(step=2, held_out_loss=1.0)
    assert (
        log.has(2, "held_out_loss") and not log.has(2, "loss") and not log.has(1, "held_out_loss")
    )
    log.close()


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    log = Log(tmp_path / "log.jsonl", 0)
    with (
        monkeypatch.context() as patch,
        pytest.raises(InfiniteVLError, match=r"no space left for .*log\.jsonl"),
    ):
        patch.setattr(
            os, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        log.write(step=1, loss=1.0)
    log.close()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_log_that_is_no_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "log.jsonl"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(InfiniteVLError, match="log.jsonl is not a regular file"):
        Log(path, 3)
