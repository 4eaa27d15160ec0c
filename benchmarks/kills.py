"""Training runs that are killed at random moments, against runs that nothing met.

Example:

    # takes minutes
    python -m benchmarks.kills --kills 50 --seed 0

Each run is a process of its own that trains a tiny model, with all of its parameters or with LoRA
on frozen ones, and saves every second step. It is killed, by SIGKILL and SIGTERM in turn: while it
starts, after a step, or while the folder of a checkpoint is being written. The same command resumes
it until it is done. After each kill all arrays of each step in the folder are compared with their
checksums. At the end, parameters, moments and losses have to be those of the run that nothing met,
bit for bit. The result goes to benchmarks/results/kills.jsonl.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from benchmarks.record import add_commit, record
from infinitevl_jax.checkpoints.array_reader import ArrayReader
from infinitevl_jax.checkpoints.files import FROZEN, PARAMS
from infinitevl_jax.train.log import read_log
from infinitevl_jax.train.shared_files import check_arrays
from infinitevl_jax.train.step_files import OPTIMIZER

ROOT = Path(__file__).resolve().parents[1]
START, STEP, CHECKPOINT = "start", "step", "checkpoint"
MOMENTS = {START: 0.2, STEP: 0.4, CHECKPOINT: 0.4}  # shares
STEPS = 24
EACH = 5  # kills of a run, at most
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PATIENCE = 600  # seconds for a run that nobody kills
TIMES = ("seconds", "tokens_per_second", "data_wait")  # what a log has of the clock

DATA = """
[run]
fsdp = 1

[train]
output = "{folder}/{name}"
steps = {steps}
log_every = 1
checkpoint_every = 2

[train.data]
path = "{folder}/rows.json"
images = "{folder}/photos"
held_out = ""
batch = 2
length = 64
patches = 64

[train.optimizer]
peak_lr = 1e-3
"""
FULL = (
    """\
[model]
min_pixels = 64
max_pixels = 256
initializer_range = 0.5

[model.text]
layer_types = ["sliding_attention", "linear_attention"]
hidden_size = 32
intermediate_size = 48
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 8
mrope_section = [2, 1, 1]
sliding_window = 16
num_linear_heads = 2
linear_head_dim = 16

[model.vision]
depth = 1
hidden_size = 32
intermediate_size = 48
num_heads = 2
patch_size = 4
window_size = 8
fullatt_block_indexes = [0]
out_hidden_size = 32
"""
    + DATA
)
LORA = (
    """\
[model]
from = "{folder}/full"
"""
    + DATA
    + """
[train.lora]
rank = 2
alpha = 4
"""
)
KINDS = {"full": FULL, "lora": LORA}


@dataclass(frozen=True)
class Kill:
    """A signal, and the moment at which it is meant to arrive.

    Attributes:
      after: seconds after the start, steps of this process, or seconds after the folder of a
        checkpoint was created.
    """

    number: signal.Signals
    moment: str
    after: float


def plan(kills: int, seed: int, starting: float) -> list[Kill]:
    """Random kills, of both signals in turn. starting: seconds until the first step."""
    rng, found = random.Random(seed), []
    ranges = {START: (0, starting), STEP: (1, 7), CHECKPOINT: (0, 0.03)}
    for index in range(kills):
        (moment,) = rng.choices([*MOMENTS], [*MOMENTS.values()])
        number = (signal.SIGKILL, signal.SIGTERM)[index % 2]
        found.append(Kill(number, moment, rng.uniform(*ranges[moment])))
    return found


@dataclass(frozen=True)
class Death:
    """How a process ended that was killed.

    Attributes:
      moment: what it was doing. status: of its exit. said: all it wrote.
    """

    kill: Kill
    moment: str
    status: int
    said: str


def wait_for(process: subprocess.Popen, kill: Kill, run: Path) -> str:
    """Wait for the moment of a kill, or for the end of the process. Returns what it was doing."""

    def lines() -> int:
        log = run / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def partial() -> set[Path]:
        return set((run / "checkpoints").glob(".*.partial"))

    left = partial()  # by a process that was killed; this one removes them

    def writing() -> bool:
        found = partial()
        left.intersection_update(found)
        return bool(found - left)

    began, first = time.monotonic(), lines()
    while process.poll() is None:
        first = min(first, lines())  # a process that resumes drops lines
        if kill.moment == START and time.monotonic() - began >= kill.after:
            break
        if kill.moment == STEP and lines() - first >= kill.after:
            break
        if kill.moment == CHECKPOINT and writing():
            time.sleep(kill.after)
            break
        time.sleep(0.005)
    return CHECKPOINT if writing() else STEP if lines() > first else START


def survive(start: Callable[[], subprocess.Popen], run: Path, kills: Iterator[Kill]) -> list[Death]:
    """Start a run until it is done, and kill it as long as there are kills.

    Raises:
      AssertionError: a process ended in a way that is no answer to its signal. InfiniteVLError: a
        step that has its name is damaged.
    """
    deaths = []
    while True:
        process, kill, moment = start(), next(kills, None), ""
        try:
            if kill is not None:
                moment = wait_for(process, kill, run)
                process.send_signal(kill.number)  # nothing happens if it has ended
            said, _ = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        status = process.returncode
        answers = {0} if kill is None else {0, -kill.number, 128 + kill.number, 130}
        assert status in answers, f"status {status}: {said[-3000:]}"
        check_steps(run)
        if status == 0:
            return deaths
        assert kill is not None
        deaths.append(Death(kill, moment, status, said))
        print(f"{run.name}: {kill.number.name} during {moment}, status {status}", flush=True)


def check_steps(run: Path) -> None:
    """Raise InfiniteVLError if a step that has its name is not whole."""
    for step in (run / "checkpoints").glob("[0-9]*"):
        json.loads((step / "data" / "metadata").read_text())
        for item in (PARAMS, OPTIMIZER, *[FROZEN] * (step / FROZEN).is_dir()):
            check_arrays(step, item)


def results(run: Path) -> dict[str, bytes | list]:
    """The end of a run: its losses, and the bytes of all arrays of its last step."""
    step = max((run / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    found: dict[str, bytes | list] = {
        "log": [
            {key: value for key, value in line.items() if key not in TIMES}
            for line in read_log(run / "log.jsonl")
        ]
    }
    for item in (PARAMS, OPTIMIZER, *[FROZEN] * (step / FROZEN).is_dir()):
        reader = ArrayReader(step, item)
        found |= {f"{item}: {name}": reader.read(name).tobytes() for name in reader.shapes}
    return found


class Runs:
    """Tiny runs in a folder, which share their compiled programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "photos").mkdir()
        rows = []
        for i in range(32):
            Image.new("RGB", (12, 12), (7 * i, 30, 30)).save(folder / "photos" / f"{i}.png")
            said = [
                {"from": "human", "value": "<image>\nHow red is it?"},
                {"from": "gpt", "value": f"It is {'very' if i > 15 else 'not'} red {i} ."},
            ]
            rows.append({"image": f"{i}.png", "conversations": said})
        (folder / "rows.json").write_text(json.dumps(rows))

    def command(self, kind: str, name: str) -> Callable[[], subprocess.Popen]:
        """Starts or resumes the run in the folder `name`."""
        preset = self.folder / f"{name}.toml"
        preset.write_text(KINDS[kind].format(folder=self.folder, name=name, steps=STEPS))
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": QUICK,
        }
        return lambda: subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), str(preset)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def seconds_to_first_step(start: Callable[[], subprocess.Popen], run: Path) -> float:
    """Run to the end. Returns when the first step was logged."""
    began, process = time.monotonic(), start()
    while process.poll() is None and not read_log(run / "log.jsonl"):
        time.sleep(0.01)
    found = time.monotonic() - began
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said[-3000:]
    return found


def differences(one: dict, other: dict) -> list[str]:
    """Names of what differs."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def campaign(folder: Path, kills: int, seed: int, at_once: int) -> dict:
    """Kill runs until they were killed `kills` times. Returns the figures."""
    began, runs, whole, starting = time.monotonic(), Runs(folder), {}, 0.0
    for kind in KINDS:
        starting = seconds_to_first_step(runs.command(kind, kind), folder / kind)
        whole[kind] = results(folder / kind)
    done: Counter[tuple[str, str]] = Counter()
    wrong: list[dict] = []
    number = 0

    def one(number: int, planned: Sequence[Kill]) -> list[Death]:
        kind, name = [*KINDS][number % len(KINDS)], f"killed{number}"
        deaths = survive(runs.command(kind, name), folder / name, iter(planned))
        if found := differences(results(folder / name), whole[kind]):
            wrong.append({"run": number, "kind": kind, "differs": found[:5]})
        return deaths

    while (left := kills - done.total()) > 0:  # some come too late: their runs have ended
        planned = plan(left, seed + number, starting)
        planned = [planned[i : i + EACH] for i in range(0, left, EACH)]
        with futures.ThreadPoolExecutor(at_once) as pool:
            for deaths in pool.map(one, range(number, number + len(planned)), planned):
                done += Counter((death.kill.number.name, death.moment) for death in deaths)
        number += len(planned)
    return {
        "kills": done.total(),
        "seed": seed,
        "runs": number,
        "runs_that_differ": wrong,
        **{
            name: {moment: done[name, moment] for moment in MOMENTS}
            for name in ("SIGKILL", "SIGTERM")
        },
        "steps": STEPS,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=2, help="runs side by side")
    add_commit(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        figures = campaign(Path(folder), args.kills, args.seed, args.at_once)
    record("kills", args.commit, figures)
    if figures["runs_that_differ"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
