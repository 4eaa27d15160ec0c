"""Opening a conversation from command-line options, and printing its answers."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from infinitevl_jax import compilation
from infinitevl_jax.checkpoints import read_config
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.checkpoints.packaged import TINY
from infinitevl_jax.cli import logs
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import Processor, check_video, load_image
from infinitevl_jax.serve.conversation import Conversation
from infinitevl_jax.serve.infinitevl import InfiniteVL
from infinitevl_jax.serve.sampling import Sampling
from infinitevl_jax.sharding import make_mesh

AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class Settings:
    """Generation options. `repetition_penalty` None is the checkpoint's."""

    max_new_tokens: int
    sampling: Sampling
    seed: int
    system: str = ""
    repetition_penalty: float | None = None

    def __post_init__(self):
        if self.repetition_penalty is not None:
            # raises for a value out of range before anything slow
            replace(self.sampling, repetition_penalty=self.repetition_penalty)

    def choice(self, model: InfiniteVL) -> Sampling:
        """How tokens of this model are chosen."""
        penalty = self.repetition_penalty
        penalty = model.defaults.repetition_penalty if penalty is None else penalty
        return replace(self.sampling, repetition_penalty=penalty)


@dataclass(frozen=True)
class Place:
    """Device options.

    Attributes:
      dtype: --dtype: "own" or the name of a dtype.
      mesh: --mesh: "" or axis=size, ...
      compilation_cache: use the compilation cache.
    """

    dtype: str = "own"
    mesh: str = ""
    compilation_cache: bool = True


def sampling(temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> Sampling:
    """Sampling from command-line options.

    Raises:
      InfiniteVLError: an option has no effect.
    """
    if temperature == 0 and (top_k or top_p < 1 or min_p):
        raise InfiniteVLError(
            "--top-k, --top-p and --min-p do nothing at temperature 0, which is greedy",
            "add --temperature 0.7, or drop them",
        )
    return Sampling(temperature, top_k, top_p, min_p)


def run_config(text: str) -> RunConfig:
    """RunConfig from "fsdp=2,tensor=4". Axes that are not named have size 1."""
    sizes = dict.fromkeys(AXES, 1)
    for entry in text.split(","):
        axis, _, size = (part.strip() for part in entry.partition("="))
        if axis not in AXES or not size.removeprefix("-").isdecimal():
            raise InfiniteVLError(
                f"--mesh {text!r}: {entry.strip()!r} is no axis and number",
                f"write such as fsdp=2,tensor=4 ({', '.join(AXES)})",
            )
        sizes[axis] = int(size)
    with _words_of_mesh(text):
        return RunConfig(**sizes)


@contextlib.contextmanager
def _words_of_mesh(text: str) -> Iterator[None]:
    """Rephrase mesh errors, which speak of run.data=..., for --mesh."""
    try:
        yield
    except InfiniteVLError as error:
        raise InfiniteVLError(
            f"--mesh {text!r}: {error.culprit.replace('run.', '')}", error.cure.replace("run.", "")
        ) from None


def media(kind: str, path: Path) -> dict:
    """Content item of an image or video file. The file is read here to report errors early."""
    if not path.is_file():
        raise InfiniteVLError(
            f"{kind} {str(path)!r} is {'a folder' if path.is_dir() else 'not there'}",
            "check the path",
        )
    load_image(path) if kind == "image" else check_video(path)
    return {"type": kind, kind: str(path)}


def read_model(
    folder: Path, place: Place, check: Callable[[Processor, bool], None]
) -> tuple[InfiniteVL, Processor]:
    """Load a checkpoint, with progress on stderr.

    Args:
      folder: a checkpoint, or a training run (its newest step).
      check: called with the processor, and whether the model has a vision tower, before the weights
        are read. It raises if the request cannot work.
    """
    run, given = run_config(place.mesh) if place.mesh else None, folder
    folder = checkpoint_folder(folder)
    if folder != given:
        say(f"{given}: its newest step, {folder}")
    processor, config = Processor.from_pretrained(folder), read_config(folder)
    check(processor, config.vision is not None)
    with _words_of_mesh(place.mesh):
        mesh = None if run is None else make_mesh(run)
    start = time.perf_counter()
    model = InfiniteVL.from_pretrained(
        folder, dtype=None if place.dtype == "own" else place.dtype, mesh=mesh, progress=True
    )
    devices = sorted(
        {d.device_kind for value in model.params.arrays.values() for d in value.devices()}
    )
    where = ", ".join(devices) + ("" if mesh is None else f" x {mesh.size} ({place.mesh})")
    say(
        f"{config.family}, {model.parameter_count:,} parameters, computing in {model.dtype} on"
        f" {where}; read in {seconds(start)}"
    )
    return model, processor


def open_model(
    folder: Path,
    place: Place,
    *,
    system: str = "",
    max_length: int | None = None,
    check: Callable[[Processor, bool], None],
) -> Conversation:
    """A conversation with the model that `read_model` loads."""
    model, processor = read_model(folder, place, check)
    return Conversation(model, processor, system=system or None, max_length=max_length)


def model_and_question(words: Sequence[str]) -> tuple[Path, str]:
    """MODEL and QUESTION of the command line. One word alone is a question to the model that comes
    with the package.

    Raises:
      InfiniteVLError: it is a folder, or there are more words.
    """
    if len(words) == 1 and Path(words[0]).is_dir():
        raise InfiniteVLError(
            f"the question to {words[0]} is missing",
            f'write it after the folder: infinitevl ask {words[0]} "What is this?"',
        )
    if len(words) > 2:
        raise InfiniteVLError(
            f"the question has several words: {' '.join(words[1:])}", "put it into quotes"
        )
    *model, question = words
    return Path(model[0] if model else TINY), question


def ask(
    folder: Path,
    question: str,
    images: Sequence[Path],
    videos: Sequence[Path],
    settings: Settings,
    place: Place,
) -> None:
    """Answer one question."""
    if question == "-":
        question = sys.stdin.read().strip()
        if not question:
            raise InfiniteVLError(
                "standard input is empty",
                'give it a question, or write one: infinitevl ask MODEL "What is this?"',
            )
    if not question.strip():
        raise InfiniteVLError(
            "the question is empty",
            'write it after the folder: infinitevl ask MODEL "What is this?"',
        )
    content = [
        media(kind, path)
        for kind, paths in (("image", images), ("video", videos))
        for path in paths
    ]

    def check(processor: Processor, sees: bool) -> None:
        if content and not sees:
            raise InfiniteVLError(
                f"{folder} is a text model, and cannot look at {content[0][content[0]['type']]!r}",
                "leave the pictures out",
            )

    with remarks(), compilation.kept(place.compilation_cache):
        conversation = open_model(folder, place, system=settings.system, check=check)
        answer(conversation, [*content, {"type": "text", "text": question}], settings)


def answer(
    conversation: Conversation,
    content: list[dict],
    settings: Settings,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Stream an answer to stdout until it ends or `stopped` returns true; then print statistics."""
    choice = settings.choice(conversation.model)
    pieces = conversation.ask(
        content, max_new_tokens=settings.max_new_tokens, sampling=choice, seed=settings.seed
    )
    try:
        for piece in pieces:
            typer.echo(piece, nl=False)
            if stopped():
                break
    finally:
        pieces.close()
    typer.echo("")
    turn = conversation.turn
    rate = f", then {turn.rate:.1f} a second" if turn.rate else ""
    say(f"read {turn.read:,} tokens, made {turn.made:,}: the first after {turn.first:.2f} s{rate}")


def say(text: str) -> None:
    """Print a message to stderr."""
    typer.echo(f"[{text}]", err=True)


def remarks() -> contextlib.AbstractContextManager[None]:
    """Within, what the package logs is shown as remarks."""
    return logs.shown(sys.stderr, "[%(message)s]")


def seconds(start: float) -> str:
    return f"{time.perf_counter() - start:.1f} s"
