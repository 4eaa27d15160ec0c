"""`python -m benchmarks.inference`: see `benchmarks.inference.command`."""

from benchmarks.inference.command import main

__all__ = ["main"]
