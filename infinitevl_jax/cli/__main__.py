"""`python -m infinitevl_jax.cli` is the same as `infinitevl`."""

from infinitevl_jax.__main__ import main

main()
