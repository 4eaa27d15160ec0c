"""`infinitevl train`."""

import sys
from typing import Annotated

import typer

from infinitevl_jax.cli.options import Keep


def train(
    ctx: typer.Context,
    config: Annotated[
        str,
        typer.Argument(
            metavar="PRESET",
            show_default=False,
            help="A preset: a TOML file, or the name of one that comes along, such as easy_vqa.",
        ),
    ] = "",
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE",
            show_default=False,
            help="Changes to it, such as train.optimizer.peak_lr=1e-4.",
        ),
    ] = [],  # noqa: B006
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            show_default=False,
            help="Of several processes: where process 0 listens. Cloud TPU, GKE, SLURM and Open MPI"
            " say this and the next two themselves.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="How many; 1: whatever a launcher says."),
    ] = None,
    process: Annotated[
        int | None, typer.Option(min=0, show_default=False, help="Number of this one, from 0.")
    ] = None,
    local_devices: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            show_default=False,
            help="Numbers of the GPUs of this host that this process uses.",
        ),
    ] = None,
    compilation_cache: Keep = True,
):
    """Train as a preset says. The same command resumes a run that was stopped.

    Ctrl-C saves after the current step, and exits with status 130.

    \b
    infinitevl train easy_vqa                                  (7 to 10 minutes on two cores)
    infinitevl train my_preset.toml
    infinitevl train easy_vqa train.output=runs/two train.seed=2           (a run beside it)
    infinitevl train easy_vqa run.fsdp=4 run.tensor=2                     (on eight devices)
    infinitevl train easy_vqa run.ops.gated_delta_rule=xla   (one implementation of an operator)
    infinitevl train easy_vqa --coordinator 10.0.0.1:1234 --processes 2 --process 0   (of two hosts)
    """
    from infinitevl_jax.config.shipped import known_presets

    if not config:
        typer.echo(ctx.get_help(), err=True)
        known = ", ".join(known_presets())
        typer.echo(f"\nerror: name a preset. Those that come along: {known}", err=True)
        raise typer.Exit(2)

    from infinitevl_jax import compilation
    from infinitevl_jax.cli import logs
    from infinitevl_jax.config.presets import load_preset
    from infinitevl_jax.processes.group import group
    from infinitevl_jax.processes.start import joined
    from infinitevl_jax.train import loop

    preset = load_preset(config, changes)
    with joined(coordinator, processes, process, _numbers(local_devices)):
        with logs.shown(sys.stdout, quiet=not group().first), compilation.kept(compilation_cache):
            finished = loop.train(preset).finished
    if not finished:
        raise typer.Exit(130)


def _numbers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of numbers, such as 0,1") from None
