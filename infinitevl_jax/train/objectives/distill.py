"""End-to-end distillation: the student's predictions against the teacher's (stage I-2)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.config.objective import DistillConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.train.forward import hidden_states
from infinitevl_jax.train.losses import distill_loss
from infinitevl_jax.train.objectives.objective import (
    STUDENT,
    TEACHER,
    Mean,
    Measured,
    Models,
    register_objective,
)


def distill(models: Models, batch: TrainBatch, options: DistillConfig) -> Measured:
    """KL divergence per valid token, and cross entropy per answer token, in nats.

    Where an image's questions are branches, the tokens of the prefix do not count. Logs the mean
    divergence (`kl`) and cross entropy, the share of answer tokens that the student predicts
    (`accuracy`), and of the compared tokens for which both predict the same (`agreement`).
    """
    known, seen = hidden_states(models[TEACHER], batch)
    vlm, hidden = hidden_states(models[STUDENT], batch)
    answers = jnp.asarray(batch.weights)
    weights = divergence_weights(vlm.config, batch, options.prompt_weight)
    sums = distill_loss(
        (known.logits, jax.lax.stop_gradient(seen)),
        (vlm.logits, hidden),
        batch.targets,
        weights,
        answers,
        options.temperature,
    )
    compared, answered = weights.sum(), answers.sum()
    factor = options.kl * options.temperature**2
    terms = []
    if options.kl:
        terms.append(Mean(factor * sums.kl, compared))
    if options.cross_entropy:
        terms.append(Mean(options.cross_entropy * sums.cross_entropy, answered))
    return Measured(
        tuple(terms),
        {
            "kl": Mean(sums.kl, compared),
            "cross_entropy": Mean(sums.cross_entropy, answered),
            "accuracy": Mean(sums.right, answered),
            "agreement": Mean(sums.agreed, compared),
        },
    )


def divergence_weights(config: ModelConfig, batch: TrainBatch, prompt_weight: float) -> Array:
    """Weight of each token [rows, length]: answers as the batch says, other text `prompt_weight`.

    A token stands for the prediction of the next one: image and video tokens are not predicted.
    """
    answers = jnp.asarray(batch.weights)
    text = batch.branches.token_index >= 0
    if config.vision is not None:
        for placeholder in (config.image_token_id, config.video_token_id):
            text &= batch.targets != placeholder
    return jnp.where((answers == 0) & text, prompt_weight, answers)


def check(configs: Mapping[str, ModelConfig], options: DistillConfig) -> None:
    """Both models have the same vocabulary."""
    sizes = {name: config.text.vocab_size for name, config in configs.items()}
    if len(set(sizes.values())) > 1:
        raise InfiniteVLError(
            f"the student has a vocabulary of {sizes[STUDENT]} tokens, the teacher of"
            f" {sizes[TEACHER]}",
            "distill from a teacher with the same tokenizer",
        )


register_objective(
    "distill", distill, options=DistillConfig, models=(STUDENT, TEACHER), check=check
)
