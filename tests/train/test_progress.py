"""The bar and its metrics fit one line of the terminal at any width."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios

import pytest

from infinitevl_jax.train.progress import Progress

FIGURES = ["loss 0.1234", "93.1% right", "1,234,567 tokens/s"]


def shown(columns, total=2300, steps=1150):
    """Lines that a terminal of this width receives."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(child, "w") as file:
        with Progress(total, 0, file) as bar:
            bar.update(steps)
            bar.show(steps, FIGURES)
    text = b""
    with contextlib.suppress(OSError):  # raised when a terminal closes
        while part := os.read(parent, 65536):
            text += part
    os.close(parent)
    return [line.rstrip() for line in re.split(r"[\r\n]|\x1b\[A", text.decode()) if line.strip()]


@pytest.mark.parametrize("columns", [200, 80, 60, 40, 20, 10])
@pytest.mark.parametrize("total", [10, 2300, 12_345_678])
def test_no_line_is_longer_than_the_terminal(columns, total):
    assert all(len(line) < columns for line in shown(columns, total, total // 2))


def test_in_80_columns_the_bar_has_its_figures():
    last = shown(80)[-1]
    assert last.endswith("loss 0.1234, 93.1% right, 1,234,567 tokens/s")
    assert last.startswith(" 50% 1150/2300") and "[00:0" in last


def test_wider_there_is_a_bar():
    last = shown(120)[-1]
    assert re.search(r"\|#+ +\|", last) and last.endswith(FIGURES[-1])


def test_narrower_the_figures_go_from_the_last_on():
    assert shown(60)[-1] == " 50% 1150/2300, loss 0.1234, 93.1% right"
    assert shown(30)[-1] == " 50% 1150/2300, loss 0.1234"
    assert shown(16)[-1] == " 50% 1150/2300"


def test_without_a_terminal_there_are_plain_lines(said):
    with Progress(4, 0) as bar:
        for step in (1, 2, 3, 4):
            bar.update()
            bar.show(step, FIGURES)
    # the first come after a while
    assert said() == ["step 4 of 4: loss 0.1234, 93.1% right, 1,234,567 tokens/s"]
    with Progress(4, 0) as bar:
        bar._told -= 31
        bar.show(2, FIGURES)
    assert said()[1].startswith("step 2 of 4: loss 0.1234")
