"""Arguments and options that several commands take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """What weights are kept and computed in."""

    own = "own"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Layout(StrEnum):
    """How a stream is written as tokens."""

    video = "video"
    reference = "reference"


Model = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="Checkpoint folder, Hugging Face's or ours, or a run: its newest step; or tiny, the"
        " model that comes along.",
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
Context = Annotated[
    int,
    typer.Option(
        "--context",
        min=64,
        help="Tokens to make room for, in models that keep the whole past (others need none).",
    ),
]
