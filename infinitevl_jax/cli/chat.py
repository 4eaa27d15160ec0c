"""Interactive conversation in the terminal."""

import contextlib
import sys
import threading
from dataclasses import replace
from pathlib import Path

import typer

from infinitevl_jax import compilation
from infinitevl_jax.cli.session import Place, Settings, answer, media, open_model, remarks, say
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.interrupts import postponed
from infinitevl_jax.processing import Processor
from infinitevl_jax.serve.conversation import Conversation

HELP = """\
/image PATH   show an image along with what you say next
/video PATH   the same with a video
/undo         take back the last question and its answer
/reset        start anew
/help         this list
/quit         leave (as does Ctrl-D); Ctrl-C stops an answer, or leaves"""


def chat(folder: Path, context: int, settings: Settings, place: Place) -> None:
    """Converse until the end of input."""
    sees = False

    def check(processor: Processor, vision: bool) -> None:
        nonlocal sees
        sees = vision
        _, prompt = processor.continuation([{"role": "user", "content": "One."}])
        turns = [("user", "One."), ("assistant", "Two."), ("user", "Three.")]
        processor.continuation([{"role": role, "content": text} for role, text in turns], prompt)

    with remarks(), compilation.kept(place.compilation_cache):
        conversation = open_model(
            folder, place, system=settings.system, max_length=context, check=check
        )
        say("/help lists the commands, Ctrl-D leaves")
        _talk(conversation, settings, sees)


def _talk(conversation: Conversation, settings: Settings, sees: bool) -> None:
    shown: list[dict] = []  # images and videos for the next question
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # optional: it improves line editing
            import readline  # noqa: F401
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/help":
                typer.echo(HELP, err=True)
            elif command == "/reset":
                conversation.reset()
                shown = []
                say("a new conversation")
            elif command == "/undo":
                say(
                    "the last question is taken back"
                    if conversation.undo()
                    else "nothing to take back: one question at most is kept"
                )
            elif command in ("/image", "/video"):
                if not sees:
                    raise InfiniteVLError("this is a text model", "it cannot look at pictures")
                if not rest.strip():
                    raise InfiniteVLError(f"{command} has no path", f"write {command} PATH")
                shown.append(media(command[1:], Path(rest.strip().strip("'\"")).expanduser()))
                say(f"{len(shown)} waiting for what you say next")
            elif command.startswith("/"):
                raise InfiniteVLError(f"there is no command {command}", "/help lists them")
            elif line:
                content, shown = [*shown, {"type": "text", "text": line}], []
                pressed = threading.Event()
                with postponed(pressed.set, "SIGINT"):
                    answer(conversation, content, settings, pressed.is_set)
                # a new seed per answer
                settings = replace(settings, seed=(settings.seed + 1) % 2**32)
        except InfiniteVLError as error:
            typer.echo(f"error: {error}", err=True)
