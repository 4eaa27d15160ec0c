"""`infinitevl convert`: between Hugging Face folders (PyTorch) and ours, without torch."""

from pathlib import Path
from typing import Annotated

import typer

from infinitevl_jax.cli.groups import commands
from infinitevl_jax.cli.host import stay_on_the_host

app = commands("convert", status=1)

Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace a checkpoint at DST, once the new one is complete."),
]


@app.callback()
def convert():
    """Convert between Hugging Face folders (PyTorch) and ours, in either direction, without torch.

    \b
    infinitevl convert import  InfiniteVL/ infinitevl-jax/
    infinitevl convert import  Qwen2.5-VL-3B/ merged/ --adapter my-lora/
    infinitevl convert export  infinitevl-jax/ InfiniteVL-again/
    infinitevl convert export  runs/sft/ tuned/                     (a run: its newest step)
    infinitevl convert export  runs/sft/checkpoints/1000/ tuned/ --max-shard-size 2GB
    infinitevl convert adapter runs/lora/ my-adapter/               (PEFT folder of a LoRA run)
    infinitevl convert inspect InfiniteVL/
    """


@app.command("import", no_args_is_help=True)
def import_(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            show_default=False,
            help="Hugging Face folder: config.json with safetensors or .bin weights.",
        ),
    ],
    dst: Annotated[
        Path,
        typer.Argument(
            metavar="DST",
            show_default=False,
            help="Our folder: params/, infinitevl_jax.json and the side files.",
        ),
    ],
    adapter: Annotated[
        list[Path],
        typer.Option(
            "--adapter",
            metavar="FOLDER",
            show_default=False,
            help="PEFT LoRA folder to merge; repeat for several.",
        ),
    ] = [],  # noqa: B006
    overwrite: Overwrite = False,
):
    """Hugging Face folder -> ours."""
    stay_on_the_host()
    from infinitevl_jax.checkpoints import import_folder
    from infinitevl_jax.checkpoints.newest import checkpoint_folder

    import_folder(checkpoint_folder(src), dst, adapters=adapter, overwrite=overwrite, progress=True)
    _wrote(dst)


@app.command(no_args_is_help=True)
def export(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            show_default=False,
            help="Our folder, a training run (its newest step), or a step of one.",
        ),
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", show_default=False, help="Hugging Face folder.")
    ],
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            help="Such as 5GB; default: the source's own shards.",
        ),
    ] = None,
    base: Annotated[
        bool,
        typer.Option("--base", help="Of a LoRA run: leave the adapter out, instead of merging it."),
    ] = False,
    overwrite: Overwrite = False,
):
    """Ours -> Hugging Face folder."""
    stay_on_the_host()
    from infinitevl_jax.checkpoints import export_folder
    from infinitevl_jax.checkpoints.newest import checkpoint_folder

    export_folder(
        checkpoint_folder(src),
        dst,
        max_shard_size=max_shard_size,
        merge=not base,
        overwrite=overwrite,
        progress=True,
    )
    _wrote(dst)


@app.command(no_args_is_help=True)
def adapter(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", show_default=False, help="A LoRA run (its newest step), or a step of it."
        ),
    ],
    dst: Annotated[Path, typer.Argument(metavar="DST", show_default=False, help="PEFT folder.")],
    overwrite: Overwrite = False,
):
    """The adapter of a LoRA run -> PEFT folder."""
    stay_on_the_host()
    from infinitevl_jax.checkpoints import export_adapter
    from infinitevl_jax.checkpoints.newest import checkpoint_folder

    found = export_adapter(checkpoint_folder(src), dst, overwrite=overwrite)
    typer.echo(f"wrote {dst}: LoRA of rank {found.rank}, alpha {found.alpha:g}")
    if found.base_trained:
        typer.echo(f"other weights were trained too; its base: convert export --base {src} BASE")


@app.command(no_args_is_help=True)
def inspect(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", show_default=False, help="Either kind of folder.")
    ],
):
    """Say what a checkpoint is: another name of `infinitevl info`."""
    stay_on_the_host()
    _show(src)


def _wrote(folder: Path) -> None:
    typer.echo(f"wrote {folder}")
    _show(folder)


def _show(folder: Path) -> None:
    from infinitevl_jax.cli import info

    typer.echo(info.as_table(info.describe(folder)))
