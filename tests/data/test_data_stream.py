"""Batches made elsewhere: the same with any number of workers, resumed to the sample, and closed
cleanly."""

import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from own_data import byte_processor, encoder_of, rows_of, write_photos, write_rows
from tiny_folder import tiny_config

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.measure import measure
from infinitevl_jax.data.pipeline import count_steps, train_batches
from infinitevl_jax.data.workers import _Worker
from infinitevl_jax.errors import InfiniteVLError, InfiniteVLWarning

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Conversations of many lengths, every third with a picture, one of them broken."""
    folder = tmp_path_factory.mktemp("stream")
    write_photos(folder / "photos")
    (folder / "photos" / "bad.png").write_bytes(b"no picture")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        said = [
            {"from": "human", "value": "<image>" * (i % 3 == 0) + "a" * int(rng.integers(1, 60))},
            {"from": "gpt", "value": f"{i}"},
        ]
        image = ["a.png", "b.png", "bad.png"][i % 7 // 3] if i % 3 == 0 else None
        rows.append({"image": image, "conversations": said})
    source = rows_of(write_rows(folder / "rows.json", rows), images=str(folder / "photos"))
    return encoder_of(source, byte_processor(folder / "words"))


DATA = dict(batch=4, length=260, patches=64, lookahead=5, max_skipped=0.3)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def same(a, b):
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in leaves)


def test_workers_change_nothing(made):
    """Two processes (three are asked for, which do not divide 4 rows) go on where a thread was: the
    same batches and places."""
    whole = train_batches(made, tiny_config(), DataConfig(**DATA), 1)
    take(whole, 2)
    place = json.loads(json.dumps(whole.get_state()))
    batches = train_batches(made, tiny_config(), DataConfig(**DATA, workers=3), 1)
    batches.set_state(place)
    found, expected = take(batches, 6), take(whole, 6)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert batches.get_state() == whole.get_state()
    batches.close()
    whole.close()


def test_workers_measure_alike(made, monkeypatch):
    monkeypatch.setattr("infinitevl_jax.data.measure.ROWS", 8)
    rows = made.within(DataConfig(**DATA))
    assert list(map(str, measure(rows, workers=1))) == list(map(str, measure(rows)))


@pytest.mark.parametrize("done", [1, 5, 12])
def test_a_resume_is_exact(made, done):
    """Also within an epoch, with conversations waiting, after unusable rows."""
    data = DataConfig(**DATA)
    whole = train_batches(made, tiny_config(), data, 2)
    take(whole, done)
    place = json.loads(json.dumps(whole.get_state()))
    assert any(lane["waiting"] for lane in place["lanes"].values())
    expected = take(whole, 6)
    fresh = train_batches(made, tiny_config(), data, 2)
    fresh.set_state(place)
    assert all(same(a, b) for a, b in zip(take(fresh, 6), expected, strict=True))
    assert fresh.get_state() == whole.get_state()


def test_a_place_of_other_data_is_refused(made):
    batches = train_batches(made, tiny_config(), DataConfig(**DATA), 2)
    place = batches.get_state()
    with pytest.raises(InfiniteVLError, match="the data had 39 rows and has 40 now"):
        batches.set_state(place | {"rows": {"": 39}})
    with pytest.raises(InfiniteVLError, match="of an earlier version"):
        batches.set_state({"taken": 3})


@pytest.mark.parametrize("epochs", [1, 2.5])
def test_a_run_of_epochs_ends_with_its_data(made, epochs):
    """`count_steps` packs as the stream does; every usable row comes as often as the epochs say."""
    data = DataConfig(**DATA)
    steps = count_steps(made, data, epochs, 3)
    batches = train_batches(made, tiny_config(), data, 3, epochs=epochs)
    found = take(batches, steps)
    with pytest.raises(InfiniteVLError, match="at its end"):
        next(batches)
    segments = sum(
        len(np.unique(ids[index >= 0]))
        for batch in found
        for ids, index in zip(batch.branches.segment_ids, batch.branches.token_index, strict=True)
    )
    usable = 40 - len([i for i in range(0, 40, 3) if i % 7 == 6])
    assert segments == usable * epochs if epochs == 1 else usable * 2 <= segments <= usable * 3


def test_a_process_whose_rows_are_at_their_end_goes_on(made):
    """Another process may have more."""
    data, half = DataConfig(**DATA), DATA["batch"] // 2

    def agree(find):
        return find()._replace(teaches=True)

    batches = [
        train_batches(made, tiny_config(), data, 3, epochs=1, rows=rows, agree=agree)
        for rows in (range(half), range(half, data.batch))
    ]
    steps = count_steps(made, data, 1, 3)
    ends = [take(part, steps + 1)[-1] for part in batches]
    assert not any(end.weights.any() for end in ends)


@pytest.mark.parametrize("questions", [0, 2])
def test_too_little_shared_memory_is_one_error(made, monkeypatch, questions):
    usage = shutil.disk_usage("/")._replace(free=1 << 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InfiniteVLError, match="2 workers need .* /dev/shm has 0 MB"):
        train_batches(made, tiny_config(), DataConfig(**DATA, workers=2, questions=questions), 0)


class Failing:
    """A source with an error of its own."""

    title = "failing"

    def __len__(self):
        return 8

    def __getitem__(self, number):
        raise ZeroDivisionError(number)


def test_a_warning_of_a_worker_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)
    _Worker(os.getpid())(0, 1)
    warnings.showwarning("x is y", InfiniteVLWarning, "file.py", 1)
    assert capsys.readouterr().err == "warning: x is y\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_names_its_row(made, workers):
    encoder = Encoder(Failing(), made.processor, tiny_config())
    batches = train_batches(encoder, tiny_config(), DataConfig(batch=1, workers=workers), 0)
    with pytest.raises(ZeroDivisionError) as caught:
        next(batches)
    batches.close()
    number = caught.value.args[0]
    assert f"while reading failing row {number}" in caught.value.__notes__


def test_nothing_is_read_in_the_caller_s_thread(made, monkeypatch):
    threads = set()
    real = type(made).pieces
    monkeypatch.setattr(
        type(made), "pieces", lambda *a: (threads.add(threading.current_thread()), real(*a))[1]
    )
    batches = train_batches(made, tiny_config(), DataConfig(**DATA), 4)
    take(batches, 2)
    batches.close()
    assert threads and threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


PROGRAM = """\
import signal, sys, time
from pathlib import Path
from own_data import byte_processor, encoder_of, rows_of
from tiny_folder import tiny_config
from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.measure import measure
from infinitevl_jax.data.pipeline import train_batches
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    rows = rows_of(folder / "rows.txt.xz", options={"chunk": 64})
    encoder = encoder_of(rows, byte_processor(folder / "words"))
    data = DataConfig(batch=2, length=64, workers=2)
    batches = train_batches(encoder, tiny_config(), data, 0)
    def stop(*_):  # later, as training does
        for _ in range(20):
            next(batches)
        sys.exit("went on")
    signal.signal(signal.SIGTERM, stop)
    try:
        next(batches)
        print("ready", flush=True)
        time.sleep(120)
    finally:
        batches.close()
        print("closed", flush=True)
"""


@pytest.fixture
def working(tmp_path):
    """A process with two workers that read a packed text, in a process group of its own."""
    (tmp_path / "rows.txt.xz").write_bytes(lzma.compress(b"A line of some words.\n" * 400))
    (tmp_path / "t").mkdir()
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "data")])
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path, "TMPDIR": str(tmp_path / "t")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n", process.stderr.read()
    assert len(unpacked(tmp_path)) == 1
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def members(group):
    """Running processes of a group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def are_gone(group):
    for _ in range(100):
        if not members(group):
            return True
        time.sleep(0.1)
    return False


def unpacked(folder):
    return list((folder / "t").glob("infinitevl-*"))


def test_ctrl_c_ends_workers_without_a_word(working, tmp_path):
    """Ctrl-C reaches all processes of the terminal."""
    assert len(members(working.pid)) >= 3
    os.killpg(working.pid, signal.SIGINT)
    out, err = working.communicate(timeout=60)
    assert out == "closed\n" and err.count("Traceback") == 1, err
    assert err.rstrip().endswith("KeyboardInterrupt"), err
    assert are_gone(working.pid) and not unpacked(tmp_path)


def test_workers_go_on_until_a_terminated_run_ends(working, tmp_path):
    """SIGTERM reaches all processes of a job."""
    os.killpg(working.pid, signal.SIGTERM)
    out, err = working.communicate(timeout=60)
    assert out == "closed\n" and err == "went on\n", err
    assert are_gone(working.pid) and not unpacked(tmp_path)


def test_workers_do_not_outlive_a_killed_run(working):
    os.kill(working.pid, signal.SIGKILL)
    assert are_gone(working.pid)
