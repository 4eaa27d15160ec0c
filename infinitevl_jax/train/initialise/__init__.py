"""Initialisation of a student's new mixers. Importing this package registers the shipped ways."""

from infinitevl_jax.train.initialise import attention, paper
from infinitevl_jax.train.initialise.initialiser import (
    Setting,
    initialise,
    register_initialiser,
)

__all__ = ["Setting", "attention", "initialise", "paper", "register_initialiser"]
