"""Groups of commands: how they look, and how they end after a user's mistake."""

import typer
from typer.core import TyperGroup

from infinitevl_jax.errors import InfiniteVLError


def commands(name: str, status: int) -> typer.Typer:
    """A group of commands that reports InfiniteVLError on stderr and exits with `status`.

    Other exceptions keep their traceback.
    """

    class Group(TyperGroup):
        def invoke(self, ctx):
            try:
                return super().invoke(ctx)
            except InfiniteVLError as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(status) from None

    return typer.Typer(
        name=name,
        cls=Group,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )
