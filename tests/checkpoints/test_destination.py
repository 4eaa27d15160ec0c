"""Destinations: what appears meanwhile is kept, an old checkpoint is replaced in one step, and a
kill leaves nothing for long."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from torch_folders import hybrid_folder

import infinitevl_jax.checkpoints.importer as importer
from infinitevl_jax.checkpoints import destination, export_folder, import_folder, load_params
from infinitevl_jax.checkpoints.destination import new_folder
from infinitevl_jax.errors import InfiniteVLError


def checkpoint(folder, text):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(text)


def fill(dst, text="new", **options):
    with new_folder(dst, **options) as work:
        (work / "config.json").write_text(text)


def content(folder):
    return {p.name: p.read_text() for p in folder.iterdir()}


def someone_writes_a_thesis(dst):
    dst.mkdir(exist_ok=True)
    (dst / "thesis.txt").write_text("three years of work")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("before", ["absent", "empty", "a checkpoint"])
def test_what_appears_meanwhile_is_kept(tmp_path, overwrite, before):
    dst = tmp_path / "dst"
    if before == "empty":
        dst.mkdir()
    elif before == "a checkpoint" and overwrite:
        checkpoint(dst, "old")
    with pytest.raises(InfiniteVLError, match="not empty|not a checkpoint"):
        with new_folder(dst, overwrite=overwrite) as work:
            (work / "config.json").write_text("new")
            (dst / "config.json").unlink(missing_ok=True)
            someone_writes_a_thesis(dst)
    assert content(dst) == {"thesis.txt": "three years of work"}
    assert os.listdir(tmp_path) == ["dst"]


@pytest.mark.parametrize("kind", ["file", "link", "link to a folder"])
def test_what_is_no_folder_is_kept(tmp_path, kind):
    dst, aside = tmp_path / "dst", tmp_path / "aside"
    aside.mkdir()
    with pytest.raises(InfiniteVLError, match="not a folder"):
        with new_folder(dst, overwrite=True):
            if kind == "file":
                dst.write_text("mine")
            else:
                dst.symlink_to(aside if kind == "link to a folder" else tmp_path / "nowhere")
    assert sorted(os.listdir(tmp_path)) == ["aside", "dst"] and not any(aside.iterdir())


def test_appears_between_the_check_and_the_exchange(tmp_path, monkeypatch):
    """The last moment: what lay there when the folders changed places is looked at again, and put
    back."""
    dst, exchange = tmp_path / "dst", destination._exchange
    checkpoint(dst, "old")

    def late(a, b):
        (dst / "config.json").unlink(missing_ok=True)
        someone_writes_a_thesis(dst)
        monkeypatch.setattr(destination, "_exchange", exchange)
        return exchange(a, b)

    monkeypatch.setattr(destination, "_exchange", late)
    with pytest.raises(InfiniteVLError, match="not a checkpoint"):
        fill(dst, overwrite=True)
    assert content(dst) == {"thesis.txt": "three years of work"} and os.listdir(tmp_path) == ["dst"]


def test_two_imports_to_one_destination(tmp_path, monkeypatch):
    """Neither with overwrite: the first to end has it, the second is told so."""
    first, second = hybrid_folder(tmp_path / "a"), hybrid_folder(tmp_path / "b", seed=9)
    dst, write = tmp_path / "dst", importer.write_arrays

    def meanwhile(work, name, arrays):
        monkeypatch.setattr(importer, "write_arrays", write)
        import_folder(second, dst)
        write(work, name, arrays)

    monkeypatch.setattr(importer, "write_arrays", meanwhile)
    with pytest.raises(InfiniteVLError, match="not empty"):
        import_folder(first, dst)
    one, other = load_params(dst, scanned=True)[1], load_params(second, scanned=True)[1]
    assert np.array_equal(one["norm.weight"], other["norm.weight"])
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "dst"]


def test_two_overwrites_at_once(tmp_path):
    """Both are allowed; the destination holds one of them, whole, at every moment."""
    dst = tmp_path / "dst"
    checkpoint(dst, "old")
    seen, stop = set(), threading.Event()

    def watch():
        while not stop.is_set():
            seen.add(tuple(content(dst).items()))

    def overwrite(text):
        for _ in range(10):
            fill(dst, text, overwrite=True)

    threads = [threading.Thread(target=overwrite, args=(text,)) for text in "ab"]
    watcher = threading.Thread(target=watch)
    watcher.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    watcher.join()
    assert content(dst)["config.json"] in "ab" and os.listdir(tmp_path) == ["dst"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(143), GeneratorExit, MemoryError])
def test_any_exception_leaves_nothing(tmp_path, stop):
    with pytest.raises(stop if isinstance(stop, type) else type(stop)):
        with new_folder(tmp_path / "new" / "parents" / "dst") as work:
            (work / "params").mkdir()
            raise stop
    assert not any(tmp_path.iterdir())


BEGIN = """
import importlib.util, os, sys, time
from pathlib import Path
# without jax, which takes seconds
spec = importlib.util.spec_from_file_location("destination", sys.argv.pop(1))
destination = importlib.util.module_from_spec(spec)
spec.loader.exec_module(destination)
"""


def run(script, *arguments):
    """A process that has run `script` up to the line "ready"."""
    command = [sys.executable, "-c", BEGIN + script, destination.__file__, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


FILL = """
with destination.new_folder(Path(sys.argv[1]), overwrite=True) as work:
    (work / "config.json").write_text("x" * 1000)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_leftovers_of_the_dead(tmp_path, caplog):
    """Removed and named when the same destination is written again; those of the living stay."""
    dead, alive = run(FILL, tmp_path / "dst"), run(FILL, tmp_path / "dst")
    try:
        assert len(os.listdir(tmp_path)) == 2
        os.kill(dead.pid, signal.SIGKILL)
        dead.wait()
        (tmp_path / ".dst.partial-notes").write_text("not ours")
        fill(tmp_path / "other")
        assert not caplog.messages and len(os.listdir(tmp_path)) == 4
        fill(tmp_path / "dst")
    finally:
        alive.kill()
        alive.wait()
        dead.stdout.close(), alive.stdout.close()
    assert len(os.listdir(tmp_path)) == 4  # both results, the notes, and what the living one writes
    said = "\n".join(caplog.messages)
    assert (
        "left by a killed conversion" in said
        and "another conversion" in said
        and ".dst.partial-" in said
    )


def test_disk_too_small_names_leftovers(tmp_path, monkeypatch):
    dead = run(FILL, tmp_path / "old name")
    dead.kill()
    dead.wait()
    dead.stdout.close()
    with pytest.raises(
        InfiniteVLError, match=r"are free there; a killed conversion left .*\.old name\.partial-"
    ):
        fill(tmp_path / "dst", needs=1 << 60)


@pytest.mark.parametrize("atomic", [True, False])
def test_killed_while_replacing(tmp_path, caplog, atomic):
    """Between any two calls that touch the destination: the old checkpoint or the new one is there,
    or is put back."""
    dst = tmp_path / "dst"
    checkpoint(dst, "old")
    script = """
calls = [int(sys.argv[2])]
def dying(call):
    def called(*args, **keys):
        if not calls[0]:
            print("ready", flush=True)
            os._exit(9)
        calls[0] -= 1
        return call(*args, **keys)
    return called
deaths = (destination.os, "rename"), (destination, "_exchange"), (destination.shutil, "rmtree")
for module, name in deaths:
    setattr(module, name, dying(getattr(module, name)))
if len(sys.argv) > 3:
    destination._exchange = lambda a, b: False
with destination.new_folder(Path(sys.argv[1]), overwrite=True) as work:
    (work / "config.json").write_text("new")
print("ready")
"""
    there = []
    for calls in range(4):
        process = run(script, dst, calls, *[] if atomic else ["two steps"])
        process.wait()
        process.stdout.close()
        there.append(content(dst)["config.json"] if dst.exists() else None)
        if dst.exists():
            fill(tmp_path / "dst", "old", overwrite=True)
        else:
            with pytest.raises(InfiniteVLError, match="--overwrite"):
                fill(dst)
            assert content(dst) == {"config.json": "old"} and "was put back" in caplog.text
        assert os.listdir(tmp_path) == ["dst"]
    assert there == (["old", "old", "new", "new"] if atomic else ["old", "old", None, "new"])


def test_exporting_over_the_source_folder_twice(tmp_path):
    """The whole way, with the old result in place: nothing but the result stays."""
    import_folder(hybrid_folder(tmp_path / "hf"), tmp_path / "ours")
    for _ in range(2):
        export_folder(tmp_path / "ours", tmp_path / "hf2", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["hf", "hf2", "ours"]
