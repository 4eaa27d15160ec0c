"""How every command of the project runs: signals, errors and missing packages end it with a line
for people."""

import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from infinitevl_jax import interrupts
from infinitevl_jax.errors import InfiniteVLError, InfiniteVLWarning
from infinitevl_jax.extras import says_which_extra


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with its status: what `main` returns (None: 0), 2 after an
    InfiniteVLError, 128 + signal.

    `main` imports what it needs itself, so that all of it is within reach of signals and of the
    word about extras.
    """
    interrupts.install()
    warnings.showwarning = _in_one_line(warnings.showwarning)
    try:
        with says_which_extra():
            status = main() or 0
    except InfiniteVLError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    finally:
        interrupts.wait_if_leaving()
    sys.exit(status)


def _in_one_line(usual: Callable) -> Callable:
    """Our own warnings without the line of code that they came from."""

    def show(message, category, *place, **rest):
        if issubclass(category, InfiniteVLWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *place, **rest)

    return show
