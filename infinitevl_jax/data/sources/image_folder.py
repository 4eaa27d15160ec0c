"""A folder of images with what to say about them: metadata.jsonl (file_name, text), or a subfolder
for each class, as Hugging Face's `imagefolder` has them."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation, from_questions
from infinitevl_jax.data.media import Media
from infinitevl_jax.data.records import open_records
from infinitevl_jax.data.sources import Source, register_source
from infinitevl_jax.data.sources.files import FileSource, options
from infinitevl_jax.data.splits import select_rows
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import convert

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


class Options(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Options of image folders.

    Attributes:
      question: asked of each image.
    """

    question: Annotated[str, Meta(min_length=1)] = "Describe this image."


class Row(msgspec.Struct):
    """An image and its text. Other keys mean nothing."""

    file_name: str
    text: str


class Files:
    """Images in subfolders, which are their texts, as records."""

    def __init__(self, folder: Path):
        self.rows = sorted(
            (str(p.relative_to(folder)), p.parent.name)
            for p in folder.glob("*/*")
            if p.suffix.lower() in SUFFIXES
        )

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int, kind: type) -> Row:
        name, text = self.rows[number]
        return convert({"file_name": name, "text": text}, kind, "the record")


class Captions:
    """Turns an image and its text into a conversation."""

    def __init__(self, question: str):
        self.question = question

    def __call__(self, row: Row, media: Media) -> Conversation:
        if not row.text:
            raise InfiniteVLError("its text is empty", "write what the answer is")
        return from_questions(media.source(row.file_name, "image"), [self.question], [row.text])


def open_image_folder(config: SourceConfig, split: str) -> Source:
    """Open a folder."""
    folder, chosen = Path(config.path), options(config, Options)
    if not folder.is_dir():
        raise InfiniteVLError(f"{folder} is no folder", "name a folder of images")
    listed = next(
        (p for p in (folder / f"metadata.{s}" for s in ("jsonl", "parquet")) if p.exists()), None
    )
    records = open_records(listed) if listed else Files(folder)
    if not len(records):
        raise InfiniteVLError(
            f"{folder} has neither metadata.jsonl nor images in subfolders",
            'write {"file_name": "a.jpg", "text": "..."} lines, or a subfolder for each class',
        )
    rows = select_rows(split, len(records), str(folder))
    media = Media(folder, folder)
    return FileSource(str(folder), records, rows, Row, Captions(chosen.question), media)


register_source("image_folder", open_image_folder)
