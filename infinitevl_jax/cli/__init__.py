"""The `infinitevl` command. JAX is imported when a command runs, which keeps `--help` fast."""

from infinitevl_jax.__main__ import main
from infinitevl_jax.cli.app import app

__all__ = ["app", "main"]
