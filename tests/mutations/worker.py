"""A worker process: reads "kind:seed" lines, runs the cases, writes one JSON line each.

python -m mutations.worker ROOT NUMBER
"""

import faulthandler
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from .case import SAID, Case, Place
from .watch import Watch, differences, snapshot

SECONDS = 20  # of processor time
WALL = 60  # seconds on the clock, for what waits: a pipe, a lock, the network
MEMORY = 3 << 30  # bytes resident at the peak
ROOM = (
    8 << 30
)  # address space beyond what a fresh worker has: what asks for more at once never gets it


class Slow(BaseException):
    """The time is over. No Exception: nothing between here and the judge may swallow it."""


def judge(kind, name: str, seed: int, place: Place, watch: Watch, begun=lambda label: None) -> dict:
    """Make a case and run it: verdict, what was done, what happened, and where in the project.

    `begun` is told what was done before the project gets to see it.
    """
    from infinitevl_jax import InfiniteVLError

    place.clear()
    case: Case = kind(random.Random(f"{name}:{seed}"), place)
    begun(case.label)
    result = {"kind": name, "case": f"{name}:{seed}", "label": case.label, "place": "", "what": ""}
    besides = (place.out, *case.writes)
    before, began = snapshot(place.work, besides), time.monotonic()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    SAID.clear()

    def say(verdict: str, what: object = "", where: str = "") -> dict:
        return {**result, "verdict": verdict, "what": str(what), "place": where or result["place"]}

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.setitimer(signal.ITIMER_REAL, WALL)
            watch.start((place.out.parent, *case.writes))
            try:
                value = case.action()
            finally:
                touched = watch.stop()
                SAID.extend(str(w.message) for w in caught)
        wrong = case.check(value)
        found = say("wrong", wrong, _reason(wrong)) if wrong else say("right")
        del value
    except InfiniteVLError as error:
        wrong = _unclear(error) or ("a harmless change was refused" if case.harmless else "")
        found = say("wrong", f"{wrong}: {error}", _place(error)) if wrong else say("refused", error)
    except Slow as error:
        found = say("slow", f"over {SECONDS} s", _place(error))
    except MemoryError as error:
        found = say("big", "MemoryError", _place(error))
    except BaseException as error:  # pyo3's panics and SystemExit are no Exceptions
        kind_of_error = "wrong" if _place(error) == "check" else "raw error"
        found = say(kind_of_error, f"{type(error).__name__}: {_first(error)}", _place(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
    peak = _peak()
    touched += differences(before, snapshot(place.work, besides), place.work)
    if touched:
        found = say("outside", "; ".join(touched[:4]), touched[0].split()[0])
    elif peak > MEMORY and found["verdict"] in ("right", "refused", "wrong"):
        found = say("big", f"{peak / 1e9:.1f} GB", "")
    return found | {"seconds": round(time.monotonic() - began, 2), "peak": peak}


def _unclear(error) -> str:
    """Why a message is not one that people can read, or ""."""
    text = str(error)
    if not (error.culprit.strip() and error.cure.strip()):
        return "no culprit or no cure"
    if not text.replace("\n", "").isprintable():
        return "control characters in the message"
    return "a message of more than a screen" if len(text) > 5000 or text.count("\n") > 24 else ""


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _place(error: BaseException) -> str:
    """The innermost line of the project that the error passed, as file:line.

    "check" where it never reached the project.
    """
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        f for f in frames if "/infinitevl_jax/" in f.filename or "/pallas_kernels/" in f.filename
    ]
    if not ours:
        return "check"
    at = ours[-1]
    return f"{at.filename[at.filename.rindex('/', 0, at.filename.rindex('/')) + 1 :]}:{at.lineno}"


def _reason(wrong: str) -> str:
    """The first words of what is wrong, so that equal causes group."""
    return "".join(c for c in wrong.split(":")[0] if not c.isdigit())[:60]


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def prepare(root: Path, number: int) -> tuple[Place, Watch]:
    """Folders, signals and limits of this process."""
    home = root / f"worker-{number}"
    for folder in (home / "work", home / "cwd", home / "tmp", root / "cache", root / "originals"):
        folder.mkdir(parents=True, exist_ok=True)
    os.chdir(home / "cwd")

    def over(number, frame):
        raise Slow

    signal.signal(signal.SIGPROF, over)
    signal.signal(signal.SIGALRM, over)
    return Place(root / "originals", home / "work"), Watch(
        [root / "cache", root / "originals", home / "tmp"]
    )


def main() -> None:
    root, number = Path(sys.argv[1]), int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints goes to the log
    stacks = (root / f"worker-{number}.stacks").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    place, watch = prepare(root, number)
    from .kinds import KINDS

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, size + ROOM))

    def answer(content: dict) -> None:
        print(json.dumps(content), file=answers, flush=True)

    answer({"ready": True})
    for line in sys.stdin:
        name, _, seed = line.strip().partition(":")
        try:
            found = judge(
                KINDS[name], name, int(seed), place, watch, lambda label: answer({"begun": label})
            )
        except BaseException:
            found = {
                "kind": name,
                "case": line.strip(),
                "label": "",
                "verdict": "wrong",
                "place": "the campaign itself",
            }
            found["what"] = traceback.format_exc()[-1500:]
        answer(found)


if __name__ == "__main__":
    main()
