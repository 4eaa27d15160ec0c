"""Ctrl-C and SIGTERM end a process in two seconds with one line and the signal's status."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from quick import QUICK

from infinitevl_jax.checkpoints.safetensors_file import SafetensorsFile

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": QUICK,
    "PYTHONUNBUFFERED": "1",
}
SECONDS = 2.0


def start(*arguments):
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=ENVIRONMENT, cwd=ROOT, **pipes
    )


def program(body):
    """A command whose main is `body` (indented). It prints "ready" for the signal."""
    return start(
        "-c",
        "import signal, sys, threading, time\nfrom infinitevl_jax.command import run\ndef"
        f" main():\n{body}\nrun(main)\n",
    )


def end(process, number=signal.SIGINT, words="interrupted"):
    """Send the signal and check the process against the above. Returns its other output."""
    began = time.monotonic()
    process.send_signal(number)
    try:
        process.wait(timeout=60)  # its standard input stays open
    finally:
        process.kill()  # it ignored the signal
    out, err = process.communicate()
    took = time.monotonic() - began
    assert process.returncode == 128 + number, err
    *before, last = err.splitlines()
    assert last == words and "Traceback" not in err and took < SECONDS, (took, err)
    return out, before


ANYWHERE = {
    "in a call that blocks": "    print('ready', flush=True); time.sleep(99)",
    "in code that swallows every exception": (
        """\
    print('ready', flush=True)
    while True:
        try: time.sleep(99)
        except BaseException: pass"""
    ),
    "in a finaliser": (
        """\
    class Slow:
        def __del__(self): print('ready', flush=True); time.sleep(99)
    Slow()"""
    ),
    "while threads work": (
        """\
    for _ in range(4): threading.Thread(target=time.sleep, args=(99,)).start()
    print('ready', flush=True); time.sleep(99)"""
    ),
    "while reading standard input": "    print('ready', flush=True); sys.stdin.read()",
    "in Python's own loop": "    print('ready', flush=True)\n    while True: pass",
    "while the device computes": (
        """\
    import jax, jax.numpy as jnp
    step = lambda i, x: jnp.sin(x) @ x
    long = jax.jit(lambda n: jax.lax.fori_loop(0, n, step, jnp.ones((64, 64))))
    long(1).block_until_ready()
    print('ready', flush=True); long(10**8).block_until_ready()"""
    ),
    "while the main thread ends on an error": (
        """\
    import atexit
    print('ready', flush=True); time.sleep(99); raise ValueError"""
    ),
}


@pytest.mark.parametrize("where", ANYWHERE)
def test_anywhere(where):
    process = program(ANYWHERE[where])
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    assert end(process)[1] == []


def test_sigterm():
    process = program("    print('ready', flush=True); time.sleep(99)")
    process.stdout.readline()
    end(process, signal.SIGTERM, "terminated")


def test_a_signal_that_is_handled_elsewhere_ends_nothing():
    process = program("""\
    asked = []
    signal.signal(signal.SIGINT, lambda *_: asked.append(1))
    print('ready', flush=True)
    while not asked: time.sleep(0.01)
    print('handled', flush=True); time.sleep(99)""")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "handled\n"
    end(process, signal.SIGTERM, "terminated")


WORK = {"in Python": "while True: pass", "in a call that blocks": "time.sleep(99)"}


@pytest.mark.parametrize(
    "first", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]], ids=["SIGINT", "SIGTERM twice"]
)
@pytest.mark.parametrize("work", WORK)
def test_a_postponed_signal(work, first):
    """As training does for the current step; the next SIGINT ends the process."""
    process = program(f"""\
    from infinitevl_jax.interrupts import postponed
    with postponed(lambda: print('asked', flush=True), "SIGINT", "SIGTERM"):
        print('ready', flush=True)
        {WORK[work]}""")
    process.stdout.readline()
    for number in first:
        process.send_signal(number)
        assert process.stdout.readline() == "asked\n"
    end(process)


def test_after_it_was_postponed():
    process = program("""\
    from infinitevl_jax.interrupts import postponed
    for _ in range(3):
        asked = threading.Event()
        with postponed(asked.set, "SIGINT"):
            print('ready', flush=True)
            asked.wait()
    print('done', flush=True); time.sleep(99)""")
    for _ in range(3):
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "done\n"
    end(process)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_folder_under_construction_goes(tmp_path, number):
    """A thread keeps writing into it; what existed before stays."""
    (tmp_path / "dst").mkdir()
    (tmp_path / "dst" / "config.json").write_text("{}")
    process = program(f"""\
    from infinitevl_jax.checkpoints.destination import new_folder
    with new_folder({str(tmp_path / "dst")!r}, overwrite=True) as work:
        def fill():
            for i in range(10**6):
                (work / str(i)).write_bytes(bytes(1000))
        threading.Thread(target=fill, daemon=True).start()
        time.sleep(0.2)
        print('ready', flush=True); time.sleep(99)""")
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    end(process, number, {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[number])
    assert [p.name for p in tmp_path.rglob("*")] == ["dst", "config.json"]


def test_an_import_leaves_nothing(tmp_path):
    """convert_torch.py while orbax's threads write."""
    process = start(
        "-c",
        f"""
import sys, time
from infinitevl_jax.__main__ import main
from torch_folders import hybrid_folder
from pathlib import Path
hybrid_folder(Path({str(tmp_path)!r}) / "src")
from infinitevl_jax.checkpoints import importer
read, count = importer.read_leaf, [0]
def slow(*arguments):
    count[0] += 1
    if count[0] == 8: print("ready", flush=True)
    if count[0] >= 8: time.sleep(0.3)
    return read(*arguments)
importer.read_leaf = slow
sys.argv[1:] = ["import", {str(tmp_path / "src")!r}, {str(tmp_path / "dst")!r}]
main("convert", "convert_torch.py")
""",
    )
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    out, before = end(process)
    assert [p.name for p in tmp_path.iterdir()] == ["src"] and out == "" and before == []


def wait_for(stream, text):
    """Read a stream up to a text."""
    seen = ""
    while text not in seen:
        more = stream.read(1)
        assert more, seen
        seen += more
    return seen


def test_ask_once_the_answer_has_begun(folder):
    process = start("-m", "infinitevl_jax", "ask", folder, "Hi", "--max-new-tokens", 10**6)
    wait_for(process.stdout, "w")
    said, before = end(process)
    assert len(said) < 10**6 and "computing in float32" in before[0]


def test_ask_before_the_weights_are_read(folder):
    process = start(
        "-c",
        f"""
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "infinitevl_jax.serve.sampling": print("ready", flush=True)
sys.meta_path.insert(0, Watch())
from infinitevl_jax.__main__ import main
sys.argv[1:] = ["ask", {str(folder)!r}, "Hi"]
main()
""",
    )
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    assert end(process) == ("", [])


def test_chat_stops_an_answer_and_then_leaves(folder):
    process = start("-m", "infinitevl_jax", "chat", folder, "--max-new-tokens", 10**6)
    process.stdin.write("Hi\n")
    process.stdin.flush()
    wait_for(process.stdout, "w")
    process.send_signal(signal.SIGINT)
    wait_for(process.stderr, "first after")
    end(process)


def test_stream_saves_its_memory(folder, tmp_path):
    """Frames come through a pipe that stays open; what was seen is in the file."""
    file, memory = io.BytesIO(), tmp_path / "memory"
    for level in (0, 90, 180):
        Image.new("RGB", (16, 16), (level,) * 3).save(file, "JPEG")
    options = ("--ask", "0.5: hi", "--max-new-tokens", 2, "--save", memory)
    process = start("-m", "infinitevl_jax", "stream", folder, "-", *options)
    # a frame ends where the next begins; the question comes before the third is pushed
    process.stdin.buffer.write(file.getvalue() + file.getvalue()[:20])
    process.stdin.buffer.flush()
    wait_for(process.stdout, "0.5 s: ")
    wait_for(process.stdout, "\n")
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=60)
    finally:
        process.kill()
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted" and "Traceback" not in err
    facts = json.loads(SafetensorsFile(memory).metadata["stream"])["memory"]
    assert facts["frames"] in (2, 3) and f"the memory is in {memory}" in err


def test_train_before_it_trains(tmp_path):
    process = start(
        "-c",
        """
import sys, time
import infinitevl_jax.config.presets as presets
def load(*_): print("ready", flush=True); time.sleep(99)
presets.load_preset = load
sys.argv = ["train.py", "configs/easy_vqa.toml"]
import runpy
runpy.run_path("train.py", run_name="__main__")
""",
    )
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    end(process)
