"""One message is enough: what orbax raises, its threads also log with a traceback each, and what
they abandoned complains later."""

import logging
import sys
from functools import cache


@cache
def report_once() -> None:
    """Leave out, for the rest of the process, what is reported of a failed save or restore beside
    the exception itself.

    Everything else is passed on as before, from whatever thread.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_news)
    before = sys.unraisablehook

    def hook(unraisable) -> None:
        # a write that tensorstore abandoned tells an event loop of orbax's that has ended with the
        # exception
        if not (
            isinstance(unraisable.exc_value, RuntimeError)
            and str(unraisable.exc_value) == "Event loop is closed"
        ):
            before(unraisable)

    sys.unraisablehook = hook


def _is_news(record: logging.LogRecord) -> bool:
    """Not an exception that orbax hands on to its caller as well: of one of its threads, or of one
    of several reads."""
    text = record.getMessage()
    return not any(
        part in text
        for part in ("_SignalingThread.run() raised", "Future exception was never retrieved")
    )
