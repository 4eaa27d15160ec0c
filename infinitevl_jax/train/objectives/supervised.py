"""Supervised fine-tuning: cross entropy of the answers (stages II and III)."""

from infinitevl_jax.config.objective import SupervisedConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.train.forward import hidden_states
from infinitevl_jax.train.losses import answer_loss
from infinitevl_jax.train.objectives.objective import (
    STUDENT,
    Mean,
    Measured,
    Models,
    register_objective,
)


def supervised(models: Models, batch: TrainBatch, options: SupervisedConfig) -> Measured:
    """Mean cross entropy of the answer tokens, in nats.

    Logs the share of answer tokens that greedy decoding predicts (`accuracy`), and of rows in which
    it predicts all of them (`exact`).
    """
    vlm, hidden = hidden_states(models[STUDENT], batch)
    sums = answer_loss(vlm.logits, hidden, batch.targets, batch.weights)
    return Measured(
        (Mean(sums.loss, sums.tokens),),
        {"accuracy": Mean(sums.right, sums.tokens), "exact": Mean(sums.exact, sums.rows)},
    )


register_objective("supervised", supervised, options=SupervisedConfig)
