"""Saving a run and going on from where it was, bit for bit."""

from infinitevl_jax.checkpoints.manager import Checkpoints

__all__ = ["Checkpoints"]
