"""What the package logs: shown by commands, silent for those who embed it."""

import io
import logging
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from infinitevl_jax.cli import logs

ROOT = Path(__file__).parents[2]
LOGGER = logging.getLogger("infinitevl_jax.train.loop")


def test_commands_show_it_and_leave_no_trace():
    package, stream = logging.getLogger("infinitevl_jax"), io.StringIO()
    before = (package.level, package.propagate, list(package.handlers))
    with logs.shown(stream, "[%(message)s]"):
        LOGGER.info("100% done")
        LOGGER.debug("a detail")
        logging.getLogger("orbax").warning("of another package")
    LOGGER.warning("later")
    assert stream.getvalue() == "[100% done]\n"
    assert (package.level, package.propagate, list(package.handlers)) == before


def test_a_bar_is_redrawn_below_it(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with logs.shown(terminal), tqdm(total=4, ncols=40, mininterval=0) as bar:
        bar.update()
        LOGGER.info("a row was left out")
    before, _, after = terminal.getvalue().partition("a row was left out\n")
    assert before.endswith("\r") and "25%" in before and "25%" in after


def test_embedded_it_says_nothing_and_can_be_listened_to():
    code = """
import logging, sys
import infinitevl_jax.train.loop
package, logger = logging.getLogger("infinitevl_jax"), infinitevl_jax.train.loop.logger
logger.info("nobody asked")
package.addHandler(logging.StreamHandler(sys.stdout))
package.propagate = False  # a dependency gives the root logger a handler
package.setLevel(logging.INFO)
logger.info("heard")
package.setLevel(logging.ERROR)
logger.warning("silenced")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert (done.stdout, done.stderr) == ("heard\n", "")
