"""Objectives: what a stage of training minimises. Importing this package registers the shipped
ones."""

from infinitevl_jax.train.objectives import distill, layerwise, supervised
from infinitevl_jax.train.objectives.objective import (
    Mean,
    Measured,
    Model,
    Models,
    Objective,
    objective,
    register_objective,
)

__all__ = [
    "Mean",
    "Measured",
    "Model",
    "Models",
    "Objective",
    "distill",
    "layerwise",
    "objective",
    "register_objective",
    "supervised",
]
