"""Two processes with four devices each train as one process with one device does, whatever ends
them."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from quick import QUICK
from tiny_run import write_preset

from infinitevl_jax.checkpoints import load_params
from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processes.start import _asked
from infinitevl_jax.train.log import read_log
from infinitevl_jax.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
MESH = ["run.data=2", "run.fsdp=2", "run.tensor=2"]
SHORT = ["train.steps=10", "train.checkpoint_every=2"]
SHORT += ["model.text.layer_types=['sliding_attention', 'linear_attention']"]
SAME = ("step", "loss", "accuracy", "grad_norm", "held_out_loss", "held_out_rows")
CLOSE = 1e-5


def lines(run):
    return [{key: line[key] for key in SAME if key in line} for line in read_log(run / "log.jsonl")]


def without_gloo(text):
    """What a process said, without the lines of its collectives. Gloo's threads write a line in
    pieces, so that the pieces of two lines may stand in any order."""
    pieces = r"\[Gloo\] Rank|(Expected number of|is) connected( to)?|peer ranks( is :)?\.?"
    return re.sub(rf"{pieces}|\d|\s", "", text)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


TRAIN = """
from infinitevl_jax.__main__ import main
from infinitevl_jax.processes import start

start.HEARTBEAT = 10
main("train", "train.py")
"""


class Pair:
    """Two processes of one run."""

    def __init__(self, preset, cache):
        environment = os.environ | cache
        environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=4 {QUICK}"
        flags = ["--coordinator", f"localhost:{free_port()}", "--processes", "2", "--process"]
        self.all = [
            subprocess.Popen(
                [sys.executable, "-c", TRAIN, str(preset), *MESH, *SHORT, *flags, str(number)],
                env=environment,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in (0, 1)
        ]

    def wait_for_step(self, run, step):
        while all(process.poll() is None for process in self.all) and not any(
            line["step"] >= step for line in read_log(run / "log.jsonl")
        ):
            time.sleep(0.01)

    def end(self):
        """Exit statuses, and what each said: [(output, errors), ...]."""
        try:
            said = [process.communicate(timeout=240) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
        return [process.returncode for process in self.all], said


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_data, cache):
    """An uninterrupted run of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("pair")
    status, said = Pair(write_preset(folder, tiny_data), cache).end()
    assert status == [0, 0], said
    return folder / "run", said


def weights(run, step=10):
    return load_params(run / "checkpoints" / str(step), scanned=True)[1]


def test_the_result_is_that_of_one_device(whole, tmp_path, tiny_data):
    run, _ = whole
    preset = load_preset(write_preset(tmp_path, tiny_data), ["run.fsdp=1", *SHORT])
    alone = train(preset).run
    pairs = list(zip(lines(run), lines(alone), strict=True))
    assert len(pairs) == 11 and "held_out_loss" in pairs[-1][0]
    for two, one in pairs:
        assert two.keys() == one.keys() and two["step"] == one["step"]
        for key in two:
            assert abs(two[key] - one[key]) <= CLOSE * max(1, abs(one[key])), (key, two, one)


def test_only_the_first_process_writes(whole):
    run, ((out, _), (other, errors)) = whole
    assert "8 x cpu; mesh: data 2 x fsdp 2 x tensor 2" in out and "done: checkpoint" in out
    assert without_gloo(other) == "" and "step 1 of" not in errors
    steps = [line["step"] for line in read_log(run / "log.jsonl")]
    assert steps == [*range(1, 11), 10]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "8"]


def test_a_run_goes_on_from_any_end(whole, tmp_path, tiny_data, cache):
    """SIGTERM to one process, then SIGKILL to one, then a damaged step: the weights at the end are
    those of a run that nothing met, bit for bit."""
    preset, run = write_preset(tmp_path, tiny_data), tmp_path / "run"
    pair = Pair(preset, cache)
    pair.wait_for_step(run, 1)
    pair.all[1].send_signal(signal.SIGTERM)
    status, said = pair.end()
    assert status == [130, 130], said
    assert "stopped at step" in said[0][0] and without_gloo(said[1][0]) == ""
    pair = Pair(preset, cache)
    pair.wait_for_step(run, 7)
    pair.all[1].kill()
    status, said = pair.end()
    assert status[0] in (2, -signal.SIGABRT) and status[1] == -signal.SIGKILL, said
    ends = ("process 0 of 2 lost the others", "process 0 of 2 cannot reach", "another task died")
    assert any(words in said[0][1] for words in ends), said[0][1]
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    files = [path for path in (newest / "params" / "state" / "d").iterdir()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-3000] + bytes(3000))
    status, said = Pair(preset, cache).end()
    assert status == [0, 0], said
    assert f"kept as {run / f'damaged-step-{newest.name}'}; going back to step" in said[0][0]
    assert lines(run) == lines(whole[0])
    ours, theirs = weights(run), weights(whole[0])
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_one_process_goes_on_with_a_run_of_two(whole, tmp_path, tiny_data):
    """And the place in the data is that of all rows."""
    shutil.copytree(whole[0], tmp_path / "run")
    more = ["run.fsdp=2", *SHORT]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10")
    preset = load_preset(write_preset(tmp_path, tiny_data), more)
    outcome = train(preset)
    assert outcome.step == 10
    for one, two in zip(lines(outcome.run), lines(whole[0]), strict=True):
        assert all(abs(one[key] - two[key]) <= CLOSE * max(1, abs(two[key])) for key in one)


AGREE = """
import sys
from infinitevl_jax.command import run
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processes.group import group
from infinitevl_jax.processes.start import joined

def fail():
    if group().index == 1:
        raise InfiniteVLError("the disk is full", "free some space")

def main():
    with joined(sys.argv[1], 2, int(sys.argv[2])):
        both = group()
        assert both.gather(lambda: both.index or None) == {1: 1}
        assert both.any(both.index == 1) and not both.any(False)
        assert both.told(["mine", both.index]) == ["mine", 0]
        assert both.by_first(lambda: "made") == (None if both.index else "made")
        if sys.argv[3] == "together":
            both.gather(fail)
        fail()
        both.gather(lambda: None)

run(main)
"""


@pytest.mark.parametrize("where", ["together", "alone"])
def test_an_error_in_one_process_ends_both(where):
    """Also where the other waits for it."""
    address, began = f"localhost:{free_port()}", time.monotonic()
    both = [
        subprocess.Popen(
            [sys.executable, "-c", AGREE, address, str(number), where],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=100)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [2, 2], said
    assert "error: process 1: the disk is full\n  -> free some space" in said[0]
    assert "error: the disk is full\n  -> free some space" in said[1]
    assert time.monotonic() - began < 90  # before a heartbeat is missed


LATE = """
import sys
from infinitevl_jax.processes import start
start.WAIT = 1
with start.joined(sys.argv[1], 2, int(sys.argv[2])):
    print("joined")
"""


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_do_not_come(process):
    done = subprocess.run(
        [sys.executable, "-c", LATE, f"localhost:{free_port()}", str(process)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert f"error: process {process} of 2 waited 1 s for the others at the" in done.stderr
    assert "--processes 1 trains in one process" in done.stderr


@pytest.mark.parametrize(
    "given, words",
    [
        (("host:1", 2, None, None), "--coordinator, --processes without --process"),
        ((None, None, 0, None), "--process without --coordinator, --processes"),
        (("host", 2, 0, None), "--coordinator is 'host'"),
        (("host:99999", 2, 0, None), "--coordinator is 'host:99999'"),
        (("host:1", 2, 2, None), "--process is 2 of 2"),
        ((None, None, None, [0]), "--local-devices is for several processes"),
    ],
)
def test_flags_that_do_not_fit(given, words):
    with pytest.raises(InfiniteVLError, match=words):
        _asked(*given)


def test_a_launcher_says_how_many_there_are(monkeypatch):
    assert _asked(None, None, None, None) is None
    step = {"JOB_ID": "7", "STEP_NODELIST": "node[1-2]", "PROCID": "1", "LOCALID": "0"}
    for name, value in step.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert _asked(None, None, None, None) == (None, None, None)
    assert _asked(None, 1, None, None) is None  # one process inside of a job of several
    assert _asked("host:1", 4, 3, None) == ("host:1", 4, 3)
    monkeypatch.setenv("SLURM_NTASKS", "many")
    with pytest.raises(InfiniteVLError, match="--processes 1 trains in one process"):
        _asked(None, None, None, None)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert _asked(None, None, None, None) is None
    assert jax.process_count() == 1
