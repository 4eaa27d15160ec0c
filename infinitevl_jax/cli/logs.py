"""The package's log records, as lines for the user of a command."""

import contextlib
import logging
from collections.abc import Iterator
from typing import TextIO

from tqdm import tqdm


class _AboveBars(logging.StreamHandler):
    """Writes each record above the progress bars of the terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


@contextlib.contextmanager
def shown(stream: TextIO, form: str = "%(message)s", quiet: bool = False) -> Iterator[None]:
    """Context manager that writes log records of `infinitevl_jax`, from INFO, to a stream only.

    Args:
      form: format of a line, as in `logging.Formatter`.
      quiet: from WARNING.
    """
    logger, handler = logging.getLogger("infinitevl_jax"), _AboveBars(stream)
    handler.setFormatter(logging.Formatter(form))
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate
