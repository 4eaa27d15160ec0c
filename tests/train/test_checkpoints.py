"""Checkpoints on disks that fail, and checkpoints of which something is lost: the step before is
used, and that is said."""

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
from concurrent import futures
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from quick import QUICK

from infinitevl_jax import train
from infinitevl_jax.checkpoints.manifest import Manifest
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.train.checkpoints import Checkpoints, abstract_state
from infinitevl_jax.train.log import Log
from infinitevl_jax.train.step import TrainState

ROOT = Path(__file__).resolve().parents[2]
HERE = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])


def state(step, size=64):
    values = jnp.arange(size, dtype=jnp.float32) + step
    frozen = {"b": jnp.arange(size, dtype=jnp.float32) * 2}
    return TrainState(
        {"a": values}, frozen, {"mu": {"a": values / 2}}, jnp.asarray(step, jnp.int32)
    )


def wanted(size=64):
    shapes = jax.eval_shape(lambda: state(0, size))
    return abstract_state(shapes, jax.tree.map(lambda _: HERE, shapes))


@pytest.fixture
def model(tmp_path):
    """A folder with a model's side files."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def opened(tmp_path, model):
    """Opens the run's checkpoints; what was logged is in `opened.said`."""

    def checkpoints(keep=3):
        return Checkpoints(tmp_path / "run", model, Manifest(), keep)

    class Kept(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    said = checkpoints.said = []
    logger, handler = logging.getLogger("infinitevl_jax.train.checkpoints"), Kept()
    logger.addHandler(handler)
    yield checkpoints
    logger.removeHandler(handler)


@pytest.fixture
def saved(opened, tmp_path):
    """A run with checkpoints of steps 2 and 4."""
    checkpoints = opened()
    for step in (2, 4):
        checkpoints.save(state(step), {"rows": step})
    return tmp_path / "run" / "checkpoints"


def restore(checkpoints, accept=None, size=64):
    places = []

    def take(place):
        places.append(place["rows"])
        if accept:
            accept(place)

    found = checkpoints.restore(wanted(size), take)
    return int(found.step), found, places


def test_a_step_that_is_a_pipe_is_refused(opened, saved):
    os.mkfifo(saved / "6")  # which a save of step 6 would wait for
    with pytest.raises(InfiniteVLError, match="6 is not a folder\n  -> remove it"):
        opened()


def test_a_step_that_holds_a_pipe_is_damaged(opened, saved):
    os.mkfifo(saved / "4" / "params" / "state" / "pipe")
    step, _, places = restore(opened())
    assert step == 2 and places == [2]
    assert (
        "pipe is not a regular file" in opened.said[0] and "going back to step 2" in opened.said[0]
    )


def test_what_was_saved_comes_back(opened, saved):
    step, found, places = restore(opened())
    assert step == 4 and places == [4] and opened.said == []
    for there, here in zip(jax.tree.leaves(found), jax.tree.leaves(state(4)), strict=True):
        np.testing.assert_array_equal(there, here)


def test_the_newest_are_kept(opened, tmp_path):
    checkpoints = opened(keep=2)
    for step in (1, 3, 5):
        checkpoints.save(state(step), {})
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["3", "5"]


def largest(folder):
    """The largest file of arrays."""
    return max(folder.rglob("d/*"), key=lambda p: p.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


def checksums(step):
    return step / "checksums" / "params.0.json"


DAMAGE = {
    "parameters' file deleted": lambda step: largest(step / "params").unlink(),
    "parameters' file cut": lambda step: cut(largest(step / "params")),
    "frozen parameters deleted": lambda step: shutil.rmtree(step / "frozen"),
    "moments' file deleted": lambda step: largest(step / "optimizer").unlink(),
    "place in the data is empty": lambda step: (step / "data" / "metadata").write_text(""),
    "place in the data is {}": lambda step: (step / "data" / "metadata").write_text("{}"),
    "place in the data is a list": lambda step: (step / "data" / "metadata").write_text("[3]"),
    "place in the data is not JSON": lambda step: (step / "data" / "metadata").write_bytes(
        b"\xff\xfe"
    ),
    "list of parameters is not JSON": lambda step: checksums(step).write_text("{"),
    "list of parameters is another": lambda step: checksums(step).write_text("{}"),
    "list of parameters deleted": lambda step: checksums(step).unlink(),
    "another step's files": lambda step: swap(step, step.with_name("2")),
}


def swap(step, other):
    os.rename(step, step.with_name("away"))
    os.rename(other, step)
    os.rename(step.with_name("away"), other)


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_step_makes_way_for_the_one_before(case, opened, saved, tmp_path):
    if case == "another step's files":  # named 4, and of step 2: neither can be trusted
        DAMAGE[case](saved / "4")
        with pytest.raises(InfiniteVLError, match="holds step 2"):
            restore(opened())
        return
    DAMAGE[case](saved / "4")
    step, found, places = restore(opened())
    assert step == 2 and places[-1] == 2
    np.testing.assert_array_equal(found.trainable["a"], state(2).trainable["a"])
    (said,) = opened.said
    assert (
        str(saved / "4") in said
        and f"kept as {tmp_path / 'run' / 'damaged-step-4'}" in said
        and said.endswith("going back to step 2")
    )
    assert len(said) < 1600 and said.count("\n") < 10
    assert "place" not in case or "data/metadata" in said
    again = opened()
    assert again.last == 2
    again.save(state(4), {"rows": 4})  # the place is free
    assert restore(again)[0] == 4


@pytest.mark.parametrize("item, name", [("params", "a"), ("optimizer", "state.mu.a")])
def test_a_flipped_bit_is_seen(opened, tmp_path, item, name):
    checkpoints = opened()
    for step in (2, 4):
        checkpoints.save(state(step, 4096), {"rows": step})
    numbers = state(4, 4096)
    numbers = numbers.trainable["a"] if item == "params" else numbers.optimizer["mu"]["a"]
    flip(tmp_path / "run" / "checkpoints" / "4" / item, numbers)
    assert restore(checkpoints, size=4096)[0] == 2
    assert f"{item}: {name} does not have the bytes that were written" in opened.said[0]


@pytest.fixture
def held(monkeypatch):
    """A thread that writes waits for held.go; what held.fails names then is not written."""

    class Held:
        go, fails = threading.Event(), None

    def waits(work, item, arrays, **options):
        assert Held.go.wait(60)
        if item == Held.fails:
            raise OSError(28, "No space left on device")
        write(work, item, arrays, **options)

    write = train.checkpoints.write_arrays
    monkeypatch.setattr(train.checkpoints, "write_arrays", waits)
    yield Held
    Held.go.set()


def test_a_step_is_written_while_the_next_one_runs(opened, saved, held):
    """From a copy: the next step takes the buffers of the state."""
    checkpoints = opened()
    restore(checkpoints)
    now = state(6)
    checkpoints.begin(now, {"rows": 6})
    assert checkpoints.steps == [4, 2] and not checkpoints.failed
    after = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)(now)
    assert now.trainable["a"].is_deleted() and int(after.step) == 7
    held.go.set()
    checkpoints.wait()
    step, found, places = restore(opened())
    assert step == 6 and places == [6] and inodes(saved / "4") == inodes(saved / "6")
    for there, here in zip(jax.tree.leaves(found), jax.tree.leaves(state(6)), strict=True):
        np.testing.assert_array_equal(there, here)


def test_what_is_being_written_is_waited_for(opened, saved, held, monkeypatch, caplog):
    monkeypatch.setattr(train.checkpoints, "_PATIENCE", 0)
    caplog.set_level(logging.INFO)
    checkpoints = opened()
    restore(checkpoints)
    checkpoints.begin(state(6), {"rows": 6})
    threading.Timer(0.2, held.go.set).start()
    assert checkpoints.save(state(8), {"rows": 8}).name == "8"
    assert checkpoints.steps == [8, 6, 4]
    assert "waiting for the checkpoint that is being written" in caplog.text


def test_a_step_that_could_not_be_written_ends_the_run(opened, saved, held):
    checkpoints = opened()
    restore(checkpoints)
    held.fails = "optimizer"
    held.go.set()
    checkpoints.begin(state(6), {"rows": 6})
    futures.wait([checkpoints._writing])
    assert checkpoints.failed
    with pytest.raises(InfiniteVLError) as caught:
        checkpoints.begin(state(7), {"rows": 7})
    assert f"no space left for checkpoint {saved / '6'}" in caught.value.culprit
    assert caught.value.cure.endswith("then the same command goes on from step 4")
    assert sorted(p.name for p in saved.iterdir()) == ["2", "4"] and not checkpoints.failed


def test_frozen_parameters_damaged_meanwhile(opened, saved):
    """The copy does not have them: the step is not written, and the next one is, at once."""
    checkpoints = opened()
    restore(checkpoints)
    largest(saved / "4" / "frozen").unlink()
    checkpoints.begin(state(6), {"rows": 6})
    futures.wait([checkpoints._writing])
    assert checkpoints.failed and sorted(p.name for p in saved.iterdir()) == ["2", "4"]
    checkpoints.begin(state(7), {"rows": 7})
    assert not checkpoints.failed and "written again" in opened.said[0]
    assert restore(opened())[0] == 7


def inodes(step):
    """Of the files with frozen parameters."""
    files = [*(step / "frozen").rglob("*"), step / "checksums" / "frozen.0.json"]
    return {path.relative_to(step): path.stat().st_ino for path in files if path.is_file()}


def test_frozen_parameters_are_written_once(opened, saved):
    """Also by a run that was resumed, and they outlive the step that they were written for."""
    assert len(inodes(saved / "2")) > 4 and inodes(saved / "2") == inodes(saved / "4")
    checkpoints = opened(keep=1)
    restore(checkpoints)
    checkpoints.save(state(6), {"rows": 6})
    assert [path.name for path in saved.iterdir()] == ["6"]
    assert all(path.stat().st_nlink == 1 for path in (saved / "6" / "frozen").rglob("d/*"))
    step, found, _ = restore(opened())
    assert step == 6 and np.array_equal(found.frozen["b"], state(6).frozen["b"])


def test_a_step_of_format_3_goes_on(opened, tmp_path):
    """It has frozen parameters among those that train."""
    old, checkpoints, folder = state(2), opened(), tmp_path / "run" / "checkpoints"
    both = old._replace(trainable={**old.trainable, **old.frozen}, frozen={})
    checkpoints.save(both, {"rows": 2})
    assert not (folder / "2" / "frozen").exists()
    assert np.array_equal(restore(checkpoints)[1].frozen["b"], old.frozen["b"])
    for step in (4, 6):
        checkpoints.save(state(step), {"rows": step})
    assert inodes(folder / "4") == inodes(folder / "6") and restore(opened())[0] == 6


def flip(folder, numbers):
    """Flip one bit of an array's numbers, which no file of the store itself would show."""
    numbers = np.asarray(numbers).tobytes()
    (path,) = (path for path in folder.rglob("d/*") if numbers in path.read_bytes())
    raw = bytearray(path.read_bytes())
    raw[raw.index(numbers) + 402] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("case", ["a bit", "deleted", "no links"])
def test_frozen_parameters_that_cannot_be_shared_are_written_again(
    case, opened, tmp_path, monkeypatch
):
    checkpoints, folder = opened(), tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        checkpoints.save(state(step, 4096), {"rows": step})
    if case == "a bit":  # of both steps
        flip(folder / "4" / "frozen", state(4, 4096).frozen["b"])
    elif case == "deleted":
        largest(folder / "4" / "frozen").unlink()
    else:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(95, "no")))
    checkpoints.save(state(6, 4096), {"rows": 6})
    assert ["written again" in said for said in opened.said] == [True] * (case != "no links")
    assert not set(inodes(folder / "4").values()) & set(inodes(folder / "6").values())
    assert restore(opened(), size=4096)[0] == 6
    monkeypatch.undo()
    checkpoints.save(state(8, 4096), {"rows": 8})  # shares those of the step that is whole
    assert inodes(folder / "6") == inodes(folder / "8")


def test_when_every_step_is_damaged_nothing_moves(opened, saved, tmp_path):
    for step in ("2", "4"):
        largest(saved / step / "params").unlink()
    with pytest.raises(InfiniteVLError) as caught:
        restore(opened())
    assert (
        str(saved / "4") in caught.value.culprit
        and "remove it to go on from step 2" in caught.value.cure
    )
    assert sorted(p.name for p in saved.iterdir()) == ["2", "4"] and opened.said == []
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints"]


def test_a_place_that_is_not_accepted_is_damage(opened, saved):
    def accept(place):
        if place["rows"] == 4:
            raise IndexError("past the end")

    assert restore(opened(), accept)[0] == 2 and "past the end" in opened.said[0]


def test_another_model_is_refused_by_name(opened, saved):
    with pytest.raises(InfiniteVLError) as caught:
        restore(opened(), size=32)
    assert caught.value.items[0] == "a is (64,) float32 there, (32,) float32 here"
    assert str(caught.value).splitlines()[1].strip() == caught.value.items[0]  # a line of its own


@pytest.mark.parametrize("content", [None, b"", b'{"spelling": "publ', b"\xff", b"[]"])
@pytest.mark.parametrize("name", ["infinitevl_jax.json", "config.json", "tokenizer.json"])
def test_side_files_cut_by_a_kill_heal(opened, saved, content, name):
    whole = (saved / "4" / name).read_bytes()
    (saved / "4" / name).unlink()
    if content is not None:
        (saved / "4" / name).write_bytes(content)
    assert restore(opened())[0] == 4
    assert (saved / "4" / name).read_bytes() == whole and Manifest.read(
        saved / "4"
    ) == Manifest.read(saved / "2")
    assert not list((saved / "4").glob(".*"))


def test_what_a_killed_save_left_is_removed(opened, saved):
    for name in (".6.partial", "6.orbax-checkpoint-tmp"):
        (saved / name).mkdir()
        (saved / name / "x").write_text("part")
    assert opened().last == 4 and sorted(p.name for p in saved.iterdir()) == ["2", "4"]


FULL = """
import resource, sys
import test_checkpoints as t
from infinitevl_jax.checkpoints.manifest import Manifest
from pathlib import Path
checkpoints = t.Checkpoints(Path(sys.argv[1]), Path(sys.argv[2]), Manifest(), 3)
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    checkpoints.save(t.state(6, 300_000), {"rows": 6})
except t.InfiniteVLError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 300, 100_000])
def test_a_full_disk(opened, saved, model, tmp_path, limit):
    """Files that may not grow stand for a disk without room, in a process of its own."""
    command = [
        sys.executable,
        "-c",
        FULL,
        str(tmp_path / "run"),
        str(model),
        str(limit),
    ]
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "PYTHONPATH": path}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    lines = told.stdout.splitlines()
    assert told.returncode == 0 and "Traceback" not in told.stderr, told.stderr[-3000:]
    assert lines[0].startswith(f"no space left for checkpoint {saved / '6'}"), lines
    assert lines[1].strip().startswith("-> free some space") and lines[1].endswith(
        "the same command goes on from step 4"
    )
    checkpoints = opened()
    assert sorted(p.name for p in saved.iterdir()) == ["2", "4"]
    assert restore(checkpoints)[0] == 4
    checkpoints.save(state(6), {"rows": 6})
    assert checkpoints.last == 6


def test_a_disk_with_too_little_room(opened, saved, monkeypatch):
    """It is not filled up first."""
    checkpoints = opened()
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 700, 700)
    )
    with pytest.raises(InfiniteVLError) as caught:
        checkpoints.save(state(6), {"rows": 6})
    assert (
        caught.value.culprit
        == f"no space left for a checkpoint of 0.0 MB in {saved}, where 0.0 MB are free"
    )
    assert caught.value.cure == "free some space; then the same command goes on from step 4"
    assert sorted(p.name for p in saved.iterdir()) == ["2", "4"]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: no room"),
        Exception("cannot write"),
        PermissionError(13, "no"),
    ],
)
def test_a_save_that_fails_says_where_to_go_on(opened, monkeypatch, error):
    checkpoints = opened()

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(train.checkpoints, "write_arrays", fails)
    with pytest.raises(InfiniteVLError) as caught:
        checkpoints.save(state(1), {})
    assert "checkpoints/1" in caught.value.culprit and caught.value.cure.endswith(
        "then the same command begins anew"
    )


def test_nothing_older_is_removed_before_the_new_one_is_on_the_disk(opened, saved, monkeypatch):
    def fails(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.checkpoints, "sync_tree", fails)
    with pytest.raises(InfiniteVLError, match="no space left"):
        opened(keep=1).save(state(6), {"rows": 6})
    assert {"2", "4"} <= {p.name for p in saved.iterdir()}
    monkeypatch.undo()
    assert restore(opened())[0] in (4, 6)


def test_places_are_json(opened, saved):
    assert json.loads((saved / "4" / "data" / "metadata").read_text()) == {"rows": 4}
    assert (
        resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    )  # the limit was another process's


def test_the_best_step_is_kept_as_well(opened, tmp_path):
    """Beside the newest: that of the lowest held-out loss, also if it was evaluated before a
    resume."""
    log = Log(tmp_path / "log.jsonl", 0)
    checkpoints = opened(keep=1)
    checkpoints.best = partial(log.lowest, "held_out_loss")
    kept = []
    for step, loss in enumerate([3.0, 1.0, 2.0, 1.0, 5.0], 1):
        checkpoints.save(state(step), {"rows": step})
        log.write(step=step, held_out_loss=loss)
        checkpoints.remove_old()
        kept.append(sorted(checkpoints.steps))
    assert kept == [[1], [2], [2, 3], [4], [4, 5]]
    log.close()
    log = Log(tmp_path / "log.jsonl", 5)
    assert log.lowest("held_out_loss", [4, 5]) == 4 and log.lowest("kl", [4, 5]) is None
    log.close()


def test_eight_devices_to_two_and_back(opened, tmp_path):
    """Parameters and moments keep every bit from mesh to mesh."""
    values = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)

    def on(devices, fsdp):
        mesh = jax.make_mesh(
            (devices // fsdp, fsdp), ("tensor", "fsdp"), devices=jax.devices()[:devices]
        )
        spec = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
        shapes = TrainState(
            {"a": jax.ShapeDtypeStruct(values.shape, np.float32)},
            {"b": jax.ShapeDtypeStruct(values.shape, jnp.bfloat16)},
            {"mu": {"a": jax.ShapeDtypeStruct(values.shape, np.float32)}},
            jax.ShapeDtypeStruct((), np.int32),
        )
        places = jax.tree.map(
            lambda x: spec if x.ndim else NamedSharding(mesh, PartitionSpec()), shapes
        )
        return abstract_state(shapes, places)

    eight = on(8, 4)
    first = TrainState(
        {"a": values},
        {"b": jnp.asarray(values, jnp.bfloat16)},
        {"mu": {"a": values / 3}},
        np.int32(1),
    )
    now = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), first, eight)
    for step, wanted in enumerate([on(2, 2), eight, on(2, 1), eight], 2):
        checkpoints = opened()
        checkpoints.save(now, {"rows": step})
        now = checkpoints.restore(wanted, lambda place: None)
        assert all(
            x.sharding == w.sharding
            for x, w in zip(jax.tree.leaves(now), jax.tree.leaves(wanted), strict=True)
        )
        now = now._replace(step=jax.device_put(np.int32(step), wanted.step.sharding))
    for there, here in zip(jax.tree.leaves(now)[:-1], jax.tree.leaves(first)[:-1], strict=True):
        assert np.asarray(there).tobytes() == np.asarray(here).tobytes()
