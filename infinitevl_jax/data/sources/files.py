"""Sources that read the records of one file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation
from infinitevl_jax.data.media import Media
from infinitevl_jax.data.records import Records, open_records
from infinitevl_jax.data.splits import select_rows
from infinitevl_jax.errors import BadRow, InfiniteVLError
from infinitevl_jax.reading import convert

T = TypeVar("T")


class FileSource(Generic[T]):
    """Records of a file, each read as a value of one type and turned into a conversation."""

    def __init__(
        self,
        title: str,
        records: Records,
        rows: Sequence[int],
        kind: type[T],
        make: Callable[[T, Media], Conversation],
        media: Media,
    ):
        """
        Args:
          rows: numbers of the records that are the source's rows.
          make: raises InfiniteVLError for a record that cannot be used.
        """
        self.title, self.records, self.rows = title, records, rows
        self.kind, self.make, self.media = kind, make, media

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, number: int) -> int:
        """Number of a row in the file."""
        return int(self.rows[range(len(self))[number]])

    def __getitem__(self, number: int) -> Conversation:
        record = self.record(number)
        try:
            return self.make(self.records.read(record, self.kind), self.media)
        except BadRow:
            raise
        except InfiniteVLError as error:
            raise BadRow(self.title, record, error.culprit, error.cure) from error


class NoOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Of sources that take none."""


def open_rows(
    config: SourceConfig, split: str, kind: type[T], make: Callable[[T, Media], Conversation]
) -> FileSource[T]:
    """The records of `config.path` as a source. It takes no options."""
    options(config, NoOptions)
    path = Path(config.path)
    records = open_records(path)
    rows = select_rows(split, len(records), str(path))
    return FileSource(str(path), records, rows, kind, make, folders(config))


def folders(config: SourceConfig) -> Media:
    """The folders of images and videos; the file's own where none is named."""
    path = Path(config.path)
    own = path if path.is_dir() else path.parent
    found = {}
    for noun in ("images", "videos"):
        name = getattr(config, noun)
        found[noun] = Path(name) if name else own
        if name and not found[noun].is_dir():
            raise InfiniteVLError(
                f"train.data.{noun} is {name!r}, which is no folder", f"name the folder of {noun}"
            )
    return Media(found["images"], found["videos"])


def options(config: SourceConfig, kind: type[T]) -> T:
    """The options of a source as a msgspec.Struct with forbid_unknown_fields.

    Raises:
      InfiniteVLError: an option is unknown or has a wrong value.
    """
    known = ", ".join(getattr(kind, "__struct_fields__", ())) or "none"
    try:
        return convert(dict(config.options), kind, "train.data.options")
    except InfiniteVLError as error:
        raise InfiniteVLError(error.culprit, f"options of this kind of source: {known}") from None
