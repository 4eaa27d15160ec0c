"""Evaluation during training: the objective on the held-out split."""

import contextlib
import logging
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.mixture import open_mixture
from infinitevl_jax.data.pipeline import held_out_batches, skipping
from infinitevl_jax.processing.ahead import Ahead
from infinitevl_jax.train.objectives import Mean, Measured
from infinitevl_jax.train.saving import Stop
from infinitevl_jax.train.setup import Start
from infinitevl_jax.train.step import TrainState, put_batch

logger = logging.getLogger(__name__)


class HeldOut:
    """Evaluates on the held-out split."""

    def __init__(self, data: DataConfig, start: Start, measure: Callable, mesh: Mesh):
        """Open the held-out split.

        Args:
          measure: maps trained and frozen parameters and a batch to `Measured`.
        """
        source = open_mixture(data, held_out=True)
        self.encoder = Encoder(source, start.processor, start.config)
        self.skipped = skipping(source, data)
        self.data, self.config, self._measure, self.mesh = data, start.config, measure, mesh

    def measure(self, state: TrainState, stop: Stop) -> dict[str, float] | None:
        """Evaluate the whole split.

        Returns:
          The metrics for the log; None if the run was asked to stop meanwhile.

        Raises:
          InfiniteVLError: more rows are unusable than `max_skipped` allows.
        """
        sums, rows = [], 0
        made = held_out_batches(self.encoder, self.config, self.data, self.skipped)
        with contextlib.closing(Ahead(made, waiting=2, live=False)) as batches:
            for batch in batches:
                for line in self.skipped.news():
                    logger.warning(f"held out: {line}")
                rows += int((np.asarray(batch.weights) > 0).any(1).sum())
                placed = put_batch(batch, self.mesh)
                sums.append(self._measure(state.trainable, state.frozen, placed))
                jax.block_until_ready(sums[-2:-1])  # bounds the queue, so that a stop is noticed
                if stop.asked:
                    return None
        total: Measured = jax.tree.map(
            lambda *xs: float(np.sum([np.asarray(x) for x in xs], dtype=np.float64)), *sums
        )
        means = {name: _mean(mean) for name, mean in total.logged.items()}
        found = {"loss": sum(map(_mean, total.loss)), **means, "rows": rows}
        return {f"held_out_{name}": value for name, value in found.items()}


def _mean(mean: Mean) -> float:
    return float(mean.total / mean.weight) if mean.weight > 0 else 0.0
