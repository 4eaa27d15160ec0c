"""Commands and their options."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperGroup

from infinitevl_jax.errors import InfiniteVLError


class Dtype(StrEnum):
    """Dtype of weights and computation."""

    own = "own"
    float32 = "float32"
    bfloat16 = "bfloat16"


class _Commands(TyperGroup):
    """Report InfiniteVLError on stderr with exit code 2. Other exceptions keep their traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except InfiniteVLError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="infinitevl",
    cls=_Commands,
    help=(
        "Ask vision-language models about images and videos, talk with them, look inside their"
        " checkpoints."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Checkpoint folder, Hugging Face's or ours, or a run: its newest step.",
    ),
]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="End an answer after this many tokens.")
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", min=0, help="0 always takes the likeliest token; above, sample."),
]
TopK = Annotated[
    int, typer.Option("--top-k", min=0, help="Sample from the k likeliest tokens; 0: from all.")
]
TopP = Annotated[
    float,
    typer.Option("--top-p", max=1, help="Sample from the likeliest tokens that together reach p."),
]
MinP = Annotated[
    float,
    typer.Option(
        "--min-p", min=0, max=1, help="Sample from tokens this fraction as likely as the likeliest."
    ),
]
Penalty = Annotated[
    float | None,
    typer.Option(
        "--repetition-penalty",
        show_default="the checkpoint's",
        help="Divide scores of what was said; 1: do not.",
    ),
]
System = Annotated[
    str,
    typer.Option(
        "--system", metavar="TEXT", show_default=False, help="A system message in front of it all."
    ),
]
Keep = Annotated[
    bool,
    typer.Option(
        "--compilation-cache/--no-compilation-cache",
        help="Keep compiled programs in the user's cache folder.",
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="The same seed samples the same answer.")
]
Kind = Annotated[
    Dtype,
    typer.Option(
        "--dtype", help="Cast the weights and compute in this; own: as the checkpoint has them."
    ),
]
Mesh = Annotated[
    str,
    typer.Option(
        "--mesh",
        metavar="AXIS=N,...",
        help="Spread over devices: data, fsdp, tensor; -1: all others.",
    ),
]


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
    """Root command."""


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
    import jax

    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # nothing is computed: do not reserve a GPU

    from infinitevl_jax.cli import info

    facts = info.describe(model)
    typer.echo(info.as_json(facts) if json else info.as_table(facts))
