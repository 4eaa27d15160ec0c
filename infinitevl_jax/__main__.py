"""Entry point of `infinitevl` and `python -m infinitevl_jax`."""

from infinitevl_jax.command import run


def _infinitevl() -> None:
    from infinitevl_jax.cli.app import app

    app(prog_name="infinitevl")


def main() -> None:
    """Run the `infinitevl` command."""
    run(_infinitevl)


if __name__ == "__main__":
    main()
