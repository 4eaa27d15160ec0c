"""Sources of rows by kind. Each file registers one.

A source is a sequence of `Conversation` with a title. `source[i]` raises BadRow for a row that
cannot be used. A source whose rows are questions about images may draw them by a `curriculum`. One
that has some rows of a file may tell their numbers there by `record(i)`.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation
from infinitevl_jax.data.records import READERS, keys_of, open_records
from infinitevl_jax.errors import InfiniteVLError


class Source(Protocol):
    """Rows by number."""

    title: str  # as errors name it

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Conversation: ...


# Opens the rows of a split. A split without rows is an InfiniteVLError.
Opener = Callable[[SourceConfig, str], Source]

_openers: dict[str, Opener] = {}
# modules of this folder, imported when their kind is asked for
_SHIPPED = ("drawn", "image_folder", "llava", "openai", "questions", "sharegpt", "text", "tfds")


def register_source(kind: str, opener: Opener) -> None:
    """Register a kind of source for `train.data.kind`.

    Raises:
      InfiniteVLError: the kind is taken by another opener.
    """
    if kind in _SHIPPED and opener.__module__ != f"{__name__}.{kind}":
        raise InfiniteVLError(f"the kind of source {kind!r} exists", "choose another name")
    _openers[kind] = opener


def kinds() -> list[str]:
    """Names of all kinds."""
    return sorted({*_SHIPPED, *_openers})


def open_source(config: SourceConfig, split: str, key: str = "train.data") -> Source:
    """Open the rows of a source.

    Args:
      split: as `config.train` and `config.held_out` have it.
      key: of the source in the preset, for errors.

    Raises:
      InfiniteVLError: the source cannot be read, or has no rows in the split.
    """
    kind = config.kind or _detect(config, key)
    if kind in _SHIPPED and kind not in _openers:
        importlib.import_module(f"{__name__}.{kind}")
    if kind not in _openers:
        raise InfiniteVLError(f"{key}.kind is {kind!r}", f"kinds of sources: {', '.join(kinds())}")
    return _openers[kind](config, split)


def readable(source: Source) -> Iterator[Conversation]:
    """All rows that can be read, for statistics. The others are reported when they are used."""
    for number in range(len(source)):
        try:
            row = source[number]
        except InfiniteVLError:
            continue
        yield row


def record_of(source: Source, number: int) -> int:
    """Number of a source's row in its file, where the source tells it."""
    record = getattr(source, "record", None)
    return number if record is None else record(number)


def _detect(config: SourceConfig, key: str) -> str:
    """The kind of a source that does not say it."""
    if not config.path:
        if not config.name:
            raise InfiniteVLError(
                f"{key} names no data",
                f"give a file of conversations ({key}.path=my.json {key}.images=photos) or a tfds"
                f" data set ({key}.name=...)",
            )
        return "tfds"
    path = Path(config.path)
    if path.is_dir() and not any(path.glob("*.parquet")):
        texts = any(p.suffix.lower() in (".txt", ".md", ".xz") for p in path.rglob("*"))
        return "text" if texts else "image_folder"
    if path.suffix.lower() not in READERS and not path.is_dir():
        return "text"
    keys = keys_of(open_records(path))
    for kind, signs in (
        ("llava", {"conversations", "image"}),
        ("llava", {"conversations", "video"}),
        ("sharegpt", {"conversations"}),
        ("sharegpt", {"messages", "images"}),
        ("sharegpt", {"messages", "videos"}),
        ("openai", {"messages"}),
        ("questions", {"questions", "answers"}),
        ("questions", {"question", "answer"}),
        ("text", {"text"}),
    ):
        if signs <= keys:
            return kind
    raise InfiniteVLError(
        f"{path}: rows with the keys {', '.join(sorted(keys)[:12]) or '(none)'} are of no known"
        " kind",
        f"say what they are: {key}.kind= one of {', '.join(kinds())}",
    )
