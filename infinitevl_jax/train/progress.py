"""Progress display: a bar in a terminal, else a log record every now and then."""

import logging
import sys
import time
from collections.abc import Sequence

from tqdm import tqdm
from tqdm.utils import disp_len

logger = logging.getLogger(__name__)

_EVERY = 30  # seconds between records without a terminal
_BAR = 8  # smallest width of the bar in columns


class Progress(tqdm):
    """A progress bar with metrics.

    In a narrow terminal it drops the bar, then the times, then metrics from the last.
    """

    def __init__(self, total: int, initial: int, file=None, quiet: bool = False):
        """Create a progress bar.

        Args:
          total, initial: steps.
          file: stream to write to; default standard error.
          quiet: show nothing.
        """
        self._quiet = quiet
        self.figures: Sequence[str] = ()
        self._told = time.monotonic()
        self._shown = (file or sys.stderr).isatty() and initial < total and not quiet
        super().__init__(
            total=total,
            initial=initial,
            file=file or sys.stderr,
            mininterval=0.5,
            dynamic_ncols=True,
            disable=not self._shown,
        )
        self.steps = (initial, total)

    def show(self, step: int, figures: Sequence[str]) -> None:
        """Show the metrics of a step, most important first."""
        self.figures = figures
        if self._shown:
            self.refresh()
        elif self._quiet:
            return
        elif step == self.steps[1] or time.monotonic() - self._told >= _EVERY:
            self._told = time.monotonic()
            logger.info(f"step {step} of {self.steps[1]}: {', '.join(figures)}")

    def __str__(self) -> str:
        facts = self.format_dict
        columns = facts["ncols"]
        counts, times = "{percentage:3.0f}% {n_fmt}/{total_fmt}", " [{elapsed}<{remaining}]"

        def line(form: str, figures: Sequence[str]) -> str:
            tail = "".join(
                f", {figure}".replace("{", "{{").replace("}", "}}") for figure in figures
            )
            return self.format_meter(
                **(facts | {"bar_format": form + tail, "ncols": None, "postfix": None})
            )

        if columns is None:
            return line(counts + times, self.figures)
        room = columns - 1 - disp_len(line(counts + times, self.figures))
        if room > _BAR:
            done = min(self.n / self.total, 1) if self.total else 1
            filled = round(done * (room - 3))
            return line(
                counts + f" |{'#' * filled}{' ' * (room - 3 - filled)}|" + times, self.figures
            )
        for form, kept in [
            (counts + times, 0),
            *((counts, cut) for cut in range(len(self.figures) + 1)),
        ]:
            text = line(form, self.figures[: len(self.figures) - kept])
            if disp_len(text) < columns:
                return text
        return text[: columns - 1]
