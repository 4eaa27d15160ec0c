"""Images and videos that rows name: files of a folder, bytes, or data: URIs."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infinitevl_jax.errors import InfiniteVLError, shown

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_MARK = re.compile(r"(<image>|<video>)")
NOUNS = {"<image>": "image", "<video>": "video"}


class Media:
    """The folders of images and videos."""

    def __init__(self, images: Path, videos: Path):
        self.folders = {"image": images, "video": videos}

    def source(self, value: Any, noun: str) -> Any:
        """What the processor opens for a value of a row.

        Args:
          value: a name relative to the folder, a data: URI, bytes, or Hugging Face's
            {"bytes": ..., "path": ...}.
          noun: "image" or "video".

        Raises:
          InfiniteVLError: a web address, a name that leads out of the folder, or another type.
        """
        if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
            value = value["bytes"] if value.get("bytes") else value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value:
            raise InfiniteVLError(
                f"{'an' if noun == 'image' else 'a'} {noun} is {shown(value)}",
                f"name a file in the folder of {noun}s",
            )
        if value[:5].lower() == "data:":
            return value
        if _ADDRESS.match(value):
            raise InfiniteVLError(
                f"the {noun} {shown(value)} is a web address",
                f"nothing is downloaded: fetch it into the folder of {noun}s and give its name",
            )
        folder = os.path.abspath(self.folders[noun])
        path = os.path.normpath(os.path.join(folder, value))
        if not path.startswith(folder.rstrip(os.sep) + os.sep):
            raise InfiniteVLError(
                f"the {noun} {shown(value)} lies outside of {self.folders[noun]}",
                f"name files relative to that folder, or choose another: train.data.{noun}s=...",
            )
        return Path(path)

    def sources(self, value: Any, noun: str) -> list[dict[str, Any]]:
        """Content items of one value, or of a list of them; None is none."""
        values = [] if value is None else value if isinstance(value, list) else [value]
        return [{"type": noun, noun: self.source(item, noun)} for item in values]


class Placeholders:
    """Images and videos of a row that <image> and <video> in its texts stand for, in order."""

    def __init__(self, images: Sequence[dict], videos: Sequence[dict]):
        self._items = {"image": list(images), "video": list(videos)}
        self._queues: dict[str, Iterator] = {k: iter(v) for k, v in self._items.items()}
        self._found = dict.fromkeys(self._items, 0)

    def fill(self, text: str, *, strip: bool = False) -> str | list[dict[str, Any]]:
        """A text with its images and videos as content items; the text itself if it has none.

        strip: without the line breaks beside a placeholder.
        """
        parts = _MARK.split(text)
        if len(parts) == 1:
            return text
        content = []
        for part in parts:
            if part in NOUNS:
                content.append(self.take(NOUNS[part]))
            elif part := part.strip("\n") if strip else part:
                content.append({"type": "text", "text": part})
        return [item for item in content if item is not None]

    def take(self, noun: str) -> dict[str, Any] | None:
        """The next image or video; None behind the last, which `check` reports."""
        self._found[noun] += 1
        return next(self._queues[noun], None)

    def check(self) -> None:
        """Raise InfiniteVLError unless there is one placeholder for each image and video."""
        for noun, items in self._items.items():
            if self._found[noun] != len(items):
                raise InfiniteVLError(
                    f"it has {self._found[noun]} x <{noun}> for {len(items)} {noun}s",
                    f"write <{noun}> once for each {noun}, in a turn of the user",
                )
