"""Data configuration: sources, their mixture, and how rows become batches."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from msgspec import Meta

from infinitevl_jax.config.ranges import Folder, Name, Share, check_ranges
from infinitevl_jax.errors import InfiniteVLError

# of a global batch, whose parts the processes hold
TOKENS = 2**26  # 1 GB of arrays
PATCHES = 2**23  # 39 GB with 1,176 values per patch: 256 rows of 8,192 image tokens

Option = bool | int | float | str | list[str]


@dataclass(frozen=True)
class SourceConfig:
    """Rows from one place.

    Attributes:
      kind: format of the rows, such as "llava" (`infinitevl_jax.data.sources`). "" looks at the
        file; without a path it is "tfds".
      path: a file or folder.
      images, videos: folders of the pictures and videos that rows name; "" is the file's folder.
      name: with kind "tfds": a data set prepared in `folder`, or a builder of this package, such as
        "easy_vqa".
      folder: with kind "tfds": location of prepared data sets.
      train, held_out: rows to train on and to evaluate on, in tfds notation: "train[:90%]". All
        rows of a file are "train". `held_out` "" is none.
      weight: passes over these rows in one epoch of the run.
      options: further settings of this kind of source.
    """

    kind: Name = ""
    path: Name = ""
    images: Name = ""
    videos: Name = ""
    name: Name = ""
    folder: Folder = "data"
    train: Name = "train"
    held_out: Name = ""
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    options: dict[str, Option] = field(default_factory=dict)

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """One source, or a mixture of named ones, and batching.

    Attributes:
      sources: the mixture by name, in place of the keys of one source.
      batch: rows of a global batch (with `questions`: images).
      questions: questions per image, drawn anew every epoch. The image is encoded once and its
        questions are branches of one prefix. 0 packs whole conversations into rows instead.
      prefix_length: tokens of an image's prefix, if questions is not 0.
      length: tokens of a packed row, or of a question's branch if questions is not 0.
      patches: patches of images and videos per packed row, if questions is 0.
      lookahead: conversations that wait to be packed, for each row of the batch. More fill the rows
        better, and take memory for their images.
      too_long: what happens to a conversation larger than a row: "skip" counts it as unusable,
        "cut" keeps its beginning. A document is always divided.
      workers: processes that read, decode and tokenise; 0 is one thread.
      max_skipped: largest share of a source's rows to skip as unusable (damaged image, too long). A
        few (`infinitevl_jax.data.skipping`) are always allowed unless this is 0.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    batch: Annotated[int, Meta(ge=1, le=2**20)] = 16
    questions: Annotated[int, Meta(ge=0, le=2**16)] = 0
    prefix_length: Annotated[int, Meta(ge=0, le=2**24)] = 32
    length: Annotated[int, Meta(ge=2, le=2**24)] = 2048
    patches: Annotated[int, Meta(ge=0, le=2**24)] = 0
    lookahead: Annotated[int, Meta(ge=1, le=2**12)] = 32
    too_long: Literal["skip", "cut"] = "skip"
    workers: Annotated[int, Meta(ge=0, le=1024)] = 0
    max_skipped: Share = 0.01

    def __post_init__(self):
        check_ranges(self)
        rows = max(self.questions, 1)
        prefix = self.prefix_length if self.questions else 0
        for what, size, limit in (
            (
                "tokens (batch x (questions x length + prefix_length))",
                rows * self.length + prefix,
                TOKENS,
            ),
            ("patches (batch x patches)", self.patches, PATCHES),
        ):
            if self.batch * size > limit:
                raise InfiniteVLError(
                    f"train.data: a batch of {self.batch * size:,} {what}, at most {limit:,} fit",
                    "make one of them smaller",
                )
        own = [f.name for f in fields(SourceConfig) if getattr(self, f.name) != _default(f)]
        if self.sources and own:
            raise InfiniteVLError(
                f"train.data gives {own[0]} beside train.data.sources",
                f"give {own[0]} to one of the sources ({', '.join(self.sources)}), or leave the"
                " sources out: train.data.sources={}",
            )

    @property
    def mixture(self) -> dict[str, SourceConfig]:
        """All sources by name, in the order of their names; one source alone has the name ""."""
        return dict(sorted(self.sources.items())) or {"": self}


def _default(f):
    return f.default_factory() if callable(f.default_factory) else f.default
