"""Entry point of `infinitevl` and `python -m infinitevl_jax`."""

from functools import partial
from typing import NoReturn

from infinitevl_jax.command import run


def main(command: str = "", name: str = "infinitevl") -> NoReturn:
    """Run the command line.

    Args:
      command: of `infinitevl`, for a script that is this command alone; "" for all of them.
      name: what the usage line calls the program.
    """
    run(partial(_start, command, name))


def _start(command: str, name: str) -> None:
    from typer.main import get_command

    from infinitevl_jax.cli.app import app

    infinitevl = get_command(app)
    program = infinitevl.commands[command] if command else infinitevl
    program.main(prog_name=name, **infinitevl.context_settings)


if __name__ == "__main__":
    main()
