"""The `infinitevl` command: ask, chat, info, train, convert. What needs JAX is imported when a
command runs, so that `--help` comes at once."""

from infinitevl_jax.__main__ import main
from infinitevl_jax.cli.app import app

__all__ = ["app", "main"]
