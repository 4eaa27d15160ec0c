"""`python -m infinitevl_jax.cli` is the same as `infinitevl`."""

from infinitevl_jax.cli.app import main

main()
