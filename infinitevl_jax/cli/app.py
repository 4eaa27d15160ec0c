"""The commands of `infinitevl`."""

from pathlib import Path
from typing import Annotated

import typer

from infinitevl_jax.cli import convert
from infinitevl_jax.cli.groups import commands
from infinitevl_jax.cli.options import (
    Dtype,
    Keep,
    Kind,
    Mesh,
    MinP,
    Model,
    NewTokens,
    Penalty,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
)
from infinitevl_jax.cli.train import train

app = commands("infinitevl", status=2)


def _version(asked: bool) -> None:
    if asked:
        from infinitevl_jax.cli.version import describe

        typer.echo(describe())
        raise typer.Exit()


@app.callback()
def infinitevl(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_version,
            help="Versions, devices, the folder of compiled programs.",
        ),
    ] = False,
):
    """Ask vision-language models about images and videos, chat with them, train them, convert and
    inspect their checkpoints."""


@app.command(no_args_is_help=True)
def ask(
    model: Model,
    question: Annotated[
        str,
        typer.Argument(
            metavar="QUESTION",
            show_default=False,
            help="What to ask; -: read it from standard input.",
        ),
    ],
    image: Annotated[
        list[Path],
        typer.Option(
            "--image", metavar="PATH", show_default=False, help="An image; repeat for several."
        ),
    ] = [],  # noqa: B006
    video: Annotated[
        list[Path],
        typer.Option(
            "--video", metavar="PATH", show_default=False, help="A video; repeat for several."
        ),
    ] = [],  # noqa: B006
    system: System = "",
    max_new_tokens: NewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    dtype: Kind = Dtype.own,
    mesh: Mesh = "",
    compilation_cache: Keep = True,
):
    """Answer one question on stdout, as it is generated. Device and speed go to stderr.

    \b
    infinitevl ask InfiniteVL/ "What is on the table?" --image kitchen.jpg
    infinitevl ask InfiniteVL/ "Which of these is older?" --image one.png --image two.png
    infinitevl ask InfiniteVL/ "What happens here?" --video clip.mp4 --dtype bfloat16
    infinitevl ask InfiniteVL/ "Write a poem." --temperature 0.7 --top-p 0.9 --seed 3
    infinitevl ask InfiniteVL/ "Hello!" --mesh fsdp=2,tensor=4
    infinitevl ask InfiniteVL/ - --system "Answer in one word." < question.txt
    """
    from infinitevl_jax.cli import session

    settings = session.Settings(
        max_new_tokens,
        session.sampling(temperature, top_k, top_p, min_p),
        seed,
        system,
        repetition_penalty,
    )
    place = session.Place(dtype.value, mesh, compilation_cache)
    session.ask(model, question, image, video, settings, place)


@app.command(no_args_is_help=True)
def chat(
    model: Model,
    context: Annotated[
        int,
        typer.Option(
            "--context",
            min=64,
            help="Tokens to make room for, in models that keep the whole past (others need none).",
        ),
    ] = 32768,
    system: System = "",
    max_new_tokens: NewTokens = 1024,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    dtype: Kind = Dtype.own,
    mesh: Mesh = "",
    compilation_cache: Keep = True,
):
    """Converse with a model. Each turn reads only new tokens.

    \b
    infinitevl chat InfiniteVL/
    infinitevl chat InfiniteVL/ --temperature 0.7 --dtype bfloat16
    \b
    In the conversation:
      /image PATH, /video PATH   show it along with what you say next
      /undo                      take back the last question and its answer
      /reset                     start anew
      /help, /quit               or Ctrl-D to leave; Ctrl-C stops an answer, or leaves
    """
    from infinitevl_jax.cli import chat, session

    settings = session.Settings(
        max_new_tokens,
        session.sampling(temperature, top_k, top_p, min_p),
        seed,
        system,
        repetition_penalty,
    )
    chat.chat(model, context, settings, session.Place(dtype.value, mesh, compilation_cache))


@app.command(no_args_is_help=True)
def info(
    model: Model,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
):
    """Describe a checkpoint: layers, parameters, bytes, tokenizer, cache. Reads headers only.

    \b
    infinitevl info InfiniteVL/
    infinitevl info runs/sft/ --json | jq .cache                    (a run: its newest step)
    infinitevl info runs/sft/checkpoints/1000/
    """
    from infinitevl_jax.cli import host, info

    host.stay_on_the_host()

    facts = info.describe(model)
    typer.echo(info.as_json(facts) if json else info.as_table(facts))


app.command()(train)
app.add_typer(convert.app)
