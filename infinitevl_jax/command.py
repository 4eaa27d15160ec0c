"""Wrapper of all commands: handles signals, errors and missing packages."""

import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from infinitevl_jax import interrupts
from infinitevl_jax.errors import InfiniteVLError, InfiniteVLWarning
from infinitevl_jax.extras import says_which_extra


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and exit with its status.

    The status is what `main` returns (None is 0), 2 after an InfiniteVLError, or 128 + signal.

    Args:
      main: imports its dependencies itself, so that signals and missing extras are handled during
        imports.
    """
    interrupts.install()
    warn_in_one_line()
    try:
        with says_which_extra():
            status = main() or 0
    except InfiniteVLError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    finally:
        interrupts.wait_if_leaving()
    sys.exit(status)


def warn_in_one_line() -> None:
    """Show warnings of this project on stderr without a source line, from now on."""
    usual = warnings.showwarning

    def show(message, category, *place, **rest):
        if issubclass(category, InfiniteVLWarning):
            print(f"warning: {message}", file=sys.stderr)
        else:
            usual(message, category, *place, **rest)

    warnings.showwarning = show
