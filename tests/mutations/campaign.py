"""Runs many cases in worker processes that are watched, and collects what came of them."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from .worker import MEMORY, SECONDS, WALL

TESTS = Path(__file__).parents[1]
GRACE = 6  # seconds that a worker has to end a case by itself
START = 300  # seconds to start a worker, or to prepare the first case of a kind


def environment(root: Path, number: int) -> dict[str, str]:
    """One CPU device, no network, caches of its own; nothing of the user's."""
    sys.path.insert(0, str(TESTS))
    from quick import QUICK

    home = root / f"worker-{number}"
    paths = os.pathsep.join(
        [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    own = {
        "HOME": home,
        "TMPDIR": home / "tmp",
        "XDG_CACHE_HOME": root / "cache",
        "MPLCONFIGDIR": root / "cache",
    }
    own |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK,
        "JAX_COMPILATION_CACHE_DIR": root / "cache" / "jax",
    }
    own |= {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "HF_HUB_OFFLINE": "1",
        "TFDS_DATA_DIR": root / "cache",
    }
    own |= {
        "PYTHONPATH": paths,
        "PYTHONDONTWRITEBYTECODE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return os.environ | {key: str(value) for key, value in own.items()}


class Worker:
    """One worker process: at most one case at a time, killed when it takes too long or too much."""

    def __init__(self, root: Path, number: int):
        self.root, self.number = root, number
        self.case: str | None = None
        self.label = ""
        self.start()

    def start(self) -> None:
        (self.root / f"worker-{self.number}" / "tmp").mkdir(parents=True, exist_ok=True)
        self.log = (self.root / f"worker-{self.number}.log").open("a")
        command = [sys.executable, "-m", "mutations.worker", str(self.root), str(self.number)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen(
            command, env=environment(self.root, self.number), **pipes, bufsize=0, cwd=self.root
        )
        self.ready, self.begun, self.began, self.used, self.buffer = (
            False,
            False,
            time.monotonic(),
            0.0,
            b"",
        )

    def send(self, case: str) -> None:
        self.case, self.label, self.began, self.begun = case, "", time.monotonic(), False
        self.process.stdin.write(case.encode() + b"\n")

    def receive(self) -> dict | None:
        """What has come since, if a line is complete.

        A finding where the worker died or had to be killed.
        """
        if select.select([self.process.stdout], [], [], 0)[0]:
            data = os.read(self.process.stdout.fileno(), 1 << 20)
            if not data:
                return self._lost(f"the process ended with {self.process.wait()}", "raw error")
            self.buffer += data
            while b"\n" in self.buffer:
                line, _, self.buffer = self.buffer.partition(b"\n")
                if "begun" not in (content := json.loads(line)):
                    return content
                self.label, self.began, self.used, self.begun = (
                    content["begun"],
                    time.monotonic(),
                    self._cpu(),
                    True,
                )
            return None
        if self.ready and self.case is None:
            return None
        passed = time.monotonic() - self.began
        if not self.begun:  # importing, or writing the originals
            if passed > START:
                raise RuntimeError(f"a worker did not start on {self.case}: see {self.log.name}")
            return None
        if self._memory() > MEMORY:
            return self._kill("big", f"over {MEMORY / 2**30:.0f} GB")
        late = passed > WALL + GRACE or self._cpu() - self.used > SECONDS + GRACE
        return (
            self._kill("slow", f"over {SECONDS} s, and could not be interrupted") if late else None
        )

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            pipe.close()

    def _kill(self, verdict: str, what: str) -> dict:
        self.process.send_signal(signal.SIGUSR1)  # where it hangs
        time.sleep(0.3)
        return self._lost(what, verdict)

    def _lost(self, what: str, verdict: str) -> dict:
        self.stop()
        stacks = (self.root / f"worker-{self.number}.stacks").read_text(errors="replace")
        where = [line for line in stacks.splitlines() if "/infinitevl_jax/" in line]
        place = (
            where[0].split('"')[1].split("/infinitevl_jax/")[1]
            + ":"
            + where[0].split("line ")[1].split()[0]
            if where
            else "?"
        )
        found = {
            "kind": (self.case or "?").split(":")[0],
            "case": self.case,
            "label": self.label,
            "what": what,
            "verdict": verdict,
            "place": place,
        }
        self.start()
        return found

    def _memory(self) -> int:
        return self._proc("statm", lambda text: int(text.split()[1]) * os.sysconf("SC_PAGESIZE"))

    def _cpu(self) -> float:
        return self._proc(
            "stat",
            lambda t: sum(map(int, t.rsplit(")", 1)[1].split()[11:13])) / os.sysconf("SC_CLK_TCK"),
        )

    def _proc(self, name: str, read) -> float:
        try:
            return read(Path(f"/proc/{self.process.pid}/{name}").read_text())
        except (OSError, IndexError):
            return 0


def run(cases: Iterable[str], root: Path, workers: int = 2) -> Iterator[dict]:
    """Results of the cases ("kind:seed"), in the order in which they end."""
    waiting = deque(cases)
    crew = [Worker(root, number) for number in range(min(workers, len(waiting)))]
    try:
        while waiting or any(w.case for w in crew):
            for worker in crew:
                found = worker.receive()
                if found and "ready" in found:
                    worker.ready = True
                elif found:
                    worker.case = None
                    yield found
                if worker.ready and worker.case is None and waiting:
                    worker.send(waiting.popleft())
            select.select([w.process.stdout for w in crew], [], [], 0.02)
    finally:
        for worker in crew:
            worker.stop()


def plan(count: int, seed: int, kinds: dict[str, int]) -> list[str]:
    """`count` cases, spread over the kinds by their weights, kinds taking turns."""
    total = sum(kinds.values())
    shares = {name: max(1, round(count * weight / total)) for name, weight in kinds.items()}
    cases = [
        ((i + 0.5) / share, f"{name}:{seed * 1_000_000 + i}")
        for name, share in shares.items()
        for i in range(share)
    ]
    return [case for _, case in sorted(cases)]
