"""The `infinitevl` command: ask, chat, info. What needs JAX is imported when a command runs, so that `--help` comes at once."""

from infinitevl_jax.cli.app import app, main

__all__ = ["app", "main"]
