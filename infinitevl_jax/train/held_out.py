"""Evaluation during training: the objective on the held-out split."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.mixture import open_mixture
from infinitevl_jax.data.pipeline import blank_batch, held_out_batches, skipping
from infinitevl_jax.processes.group import Group
from infinitevl_jax.processing.ahead import Ahead
from infinitevl_jax.sharding import own_parts, own_rows
from infinitevl_jax.train.agreement import BadRows, bad_rows
from infinitevl_jax.train.objectives import Mean, Measured
from infinitevl_jax.train.saving import Stop
from infinitevl_jax.train.setup import Start
from infinitevl_jax.train.step import TrainState, put_batch

logger = logging.getLogger(__name__)


class HeldOut:
    """Evaluates on the held-out split."""

    def __init__(
        self, data: DataConfig, start: Start, measure: Callable, mesh: Mesh, together: Group
    ):
        """Open the held-out split. Each process reads the part of it that its devices evaluate.

        Args:
          measure: maps trained and frozen parameters and a batch to `Measured`.
        """
        source = open_mixture(data, held_out=True)
        self.encoder = Encoder(source, start.processor, start.config)
        self.skipped = skipping(source, data)
        self.data, self.config, self._measure, self.mesh = data, start.config, measure, mesh
        self._together, self._rows = together, own_rows(mesh, data.batch)

    def measure(self, state: TrainState, stop: Stop) -> dict[str, float] | None:
        """Evaluate the whole split.

        Returns:
          The metrics for the log; None if the run was asked to stop meanwhile.

        Raises:
          InfiniteVLError: more rows are unusable than `max_skipped` allows.
        """
        sums, rows, bad = [], 0, BadRows()
        blank = blank_batch(self.config, self.data, len(self._rows))
        made = held_out_batches(self.encoder, self.config, self.data, bad, self._rows)
        with contextlib.closing(Ahead(made, waiting=2, live=False)) as ahead:
            batches = iter(ahead)
            while True:
                own, told = self._next(batches, bad, stop)
                if any("stop" in said for said in told):
                    return None
                if sum("end" in said for said in told) == self._together.count:
                    break
                placed = put_batch(own or blank, self.mesh)
                rows += _answered(own) if own else 0
                sums.append(self._measure(state.trainable, state.frozen, placed))
                jax.block_until_ready(sums[-2:-1])  # bounds the queue, so that a stop is noticed
        total: Measured = jax.tree.map(
            lambda *xs: float(np.sum([np.asarray(x) for x in xs], dtype=np.float64)), *sums
        )
        means = {name: _mean(mean) for name, mean in total.logged.items()}
        rows = self._rows_of_all(rows)
        found = {"loss": sum(map(_mean, total.loss)), **means, "rows": rows}
        return {f"held_out_{name}": value for name, value in found.items()}

    def _next(
        self, batches: Iterator[TrainBatch], bad: BadRows, stop: Stop
    ) -> tuple[TrainBatch | None, list[dict[str, Any]]]:
        """This process's part of the next batch, None after its last, and what all say of it."""
        made: list[TrainBatch] = []

        def say() -> dict[str, Any] | None:
            made.extend(itertools.islice(batches, 1))
            said = {"end": not made, "stop": stop.asked, "bad": bad.take()}
            return {key: value for key, value in said.items() if value} or None

        told = list(self._together.gather(say).values())
        for row in bad_rows(told):
            self.skipped.add(row)
        for line in self.skipped.news():
            logger.warning(f"held out: {line}")
        return made[0] if made else None, told

    def _rows_of_all(self, rows: int) -> int:
        """Rows with an answer in the whole split. Processes whose devices share rows count them
        together."""
        own = own_parts(self.mesh)[0]
        told = {
            tuple(parts): count
            for parts, count in self._together.gather(lambda: [own, rows]).values()
        }
        return sum(told.values())


def _answered(batch: TrainBatch) -> int:
    """Questions, or conversations, with an answer."""
    answers = np.asarray(batch.weights) > 0
    segments = np.asarray(batch.branches.segment_ids)
    return sum(len(np.unique(s[a])) for s, a in zip(segments, answers, strict=True))


def _mean(mean: Mean) -> float:
    return float(mean.total / mean.weight) if mean.weight > 0 else 0.0
