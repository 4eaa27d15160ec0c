"""`infinitevl eval`."""

from pathlib import Path
from typing import Annotated

import typer

from infinitevl_jax.cli.options import Dtype, Keep, Kind, Mesh, Model


def evaluate(
    model: Model,
    preset: Annotated[
        str,
        typer.Argument(
            metavar="PRESET",
            show_default=False,
            help="A preset, whose held-out rows are asked: a file, or the name of one.",
        ),
    ],
    changes: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE",
            show_default=False,
            help="Changes to it, such as train.data.held_out=test.",
        ),
    ] = [],  # noqa: B006
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            show_default=False,
            help="Write results.json, and samples.png with right and wrong answers.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts of a call, at most.")] = 64,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="End an answer after this many tokens.")
    ] = 32,
    dtype: Kind = Dtype.own,
    mesh: Mesh = "",
    compilation_cache: Keep = True,
):
    """Ask the held-out questions of a preset's data, and count the exact answers.

    Each question is asked alone after its pictures. "blind" is the most common answer to the same
    question in the training rows, without a look at the picture.

    \b
    infinitevl eval runs/easy_vqa easy_vqa
    infinitevl eval InfiniteVL/ my_preset.toml train.data.held_out="train[99%:]" --output figures
    """
    from tqdm import tqdm

    from infinitevl_jax import compilation
    from infinitevl_jax.cli import session
    from infinitevl_jax.config.presets import load_preset
    from infinitevl_jax.eval import tasks
    from infinitevl_jax.eval.report import table, write_results

    data = load_preset(preset, changes).train.data
    place = session.Place(dtype.value, mesh, compilation_cache)
    with session.remarks(), compilation.kept(compilation_cache):
        opened = tasks.open_tasks(data)
        network, processor = session.read_model(model, place, lambda processor, sees: None)
        results = tasks.evaluate(
            network,
            processor,
            opened,
            batch=batch,
            max_new_tokens=max_new_tokens,
            progress=lambda groups, name: tqdm(groups, desc=name or "questions", disable=None),
        )
    for line in table(results):
        typer.echo(line)
    if output is not None:
        write_results(output, opened, results)
        session.say(f"wrote {output / 'results.json'} and {output / 'samples.png'}")
