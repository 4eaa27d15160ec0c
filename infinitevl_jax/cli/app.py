"""The commands of `infinitevl`."""

from pathlib import Path
from typing import Annotated

import typer

from infinitevl_jax.cli import convert
from infinitevl_jax.cli.data import data
from infinitevl_jax.cli.evaluate import evaluate
from infinitevl_jax.cli.groups import commands
from infinitevl_jax.cli.options import (
    Context,
    Dtype,
    Keep,
    Kind,
    Layout,
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
    """Ask vision-language models about images and videos, watch streams, chat with them, train
    them, convert and inspect their checkpoints."""


@app.command(no_args_is_help=True)
def ask(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] QUESTION",
            show_default=False,
            help="A model as elsewhere, by default the one that comes along (tiny); and what to"
            " ask it, - for standard input.",
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
    infinitevl ask "What is the total?" --image receipt.png
    infinitevl ask InfiniteVL/ "Which of these is older?" --image one.png --image two.png
    infinitevl ask InfiniteVL/ "What happens here?" --video clip.mp4 --dtype bfloat16
    infinitevl ask InfiniteVL/ "Write a poem." --temperature 0.7 --top-p 0.9 --seed 3
    infinitevl ask InfiniteVL/ "Hello!" --mesh fsdp=2,tensor=4
    infinitevl ask InfiniteVL/ - --system "Answer in one word." < question.txt
    """
    from infinitevl_jax.cli import session

    model, question = session.model_and_question(words)
    choice = session.sampling(temperature, top_k, top_p, min_p)
    settings = session.Settings(max_new_tokens, choice, seed, system, repetition_penalty)
    place = session.Place(dtype.value, mesh, compilation_cache)
    session.ask(model, question, image, video, settings, place)


@app.command(no_args_is_help=True)
def chat(
    model: Model,
    context: Context = 32768,
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

    choice = session.sampling(temperature, top_k, top_p, min_p)
    settings = session.Settings(max_new_tokens, choice, seed, system, repetition_penalty)
    chat.chat(model, context, settings, session.Place(dtype.value, mesh, compilation_cache))


@app.command(no_args_is_help=True)
def stream(
    model: Model,
    video: Annotated[
        str,
        typer.Argument(
            metavar="VIDEO",
            show_default=False,
            help="A film, a camera such as /dev/video0, or -: frames from standard input.",
        ),
    ],
    ask: Annotated[
        list[str],
        typer.Option(
            "--ask",
            metavar="[SECONDS: ]QUESTION",
            show_default=False,
            help="A question at this time of the video, without a time at its end; repeat for"
            " several.",
        ),
    ] = [],  # noqa: B006
    fps: Annotated[
        float | None,
        typer.Option("--fps", show_default="the checkpoint's", help="Frames to look at a second."),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            min=1,
            show_default="the checkpoint's",
            help="Pixels of a frame at most; larger ones are shrunk.",
        ),
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            "--size",
            metavar="WxH",
            show_default=False,
            help="Standard input is raw rgb24 of this size; otherwise it is motion JPEG.",
        ),
    ] = "",
    live: Annotated[
        bool,
        typer.Option(
            "--live",
            help="Standard input comes as it happens: frames get the time at which they come, and"
            " the oldest are dropped when they come too fast. A camera always does.",
        ),
    ] = False,
    waiting: Annotated[
        int, typer.Option("--waiting", min=1, help="Frames that may wait to be read.")
    ] = 16,
    load: Annotated[
        Path | None,
        typer.Option(
            "--load", metavar="FILE", show_default=False, help="Go on from this saved memory."
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FILE",
            show_default=False,
            help="Keep the memory in this file, at the end or when stopped.",
        ),
    ] = None,
    context: Context = 32768,
    layout: Annotated[
        Layout | None,
        typer.Option(
            "--layout",
            show_default="video",
            help="Tokens and positions: one video in a turn, or the reference's format.",
        ),
    ] = None,
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
    """Watch a video in constant memory, and answer questions as their times come.

    Answers go to stdout, each with its time; progress and remarks go to stderr. Ctrl-C saves the
    memory where --save asks for it, and exits with status 130.

    \b
    infinitevl stream InfiniteVL/ film.mp4 --ask "12.5: what is happening?" --ask "And the end?"
    infinitevl stream InfiniteVL/ one.mp4 --fps 4 --save memory.safetensors
    infinitevl stream InfiniteVL/ two.mp4 --load memory.safetensors --ask "What is new?"
    infinitevl stream InfiniteVL/ /dev/video0 --ask "60: who came in?" --dtype bfloat16
    ffmpeg -i IN -r 2 -f mjpeg - | infinitevl stream InfiniteVL/ - --fps 2 --ask "What happened?"
    ffmpeg -i IN -f rawvideo -pix_fmt rgb24 - | infinitevl stream InfiniteVL/ - --size 640x480
    """
    from infinitevl_jax.cli import session, stream

    choice = session.sampling(temperature, top_k, top_p, min_p)
    settings = session.Settings(max_new_tokens, choice, seed, system, repetition_penalty)
    watch = stream.Watch(
        video,
        ask,
        fps,
        max_pixels,
        size,
        live,
        waiting,
        load,
        save,
        context,
        layout and layout.value,
    )
    place = session.Place(dtype.value, mesh, compilation_cache)
    if signal := stream.stream(model, watch, settings, place):
        raise typer.Exit(128 + signal)


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
app.command(no_args_is_help=True)(data)
app.command("eval", no_args_is_help=True)(evaluate)
app.add_typer(convert.app)
