"""Validation of conversations, and their split into template data and media."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from infinitevl_jax.errors import InfiniteVLError, shown
from infinitevl_jax.processing.sources import describe
from infinitevl_jax.processing.spelled import check_spelling, check_unicode, guard

ROLES = ("system", "user", "assistant", "tool")
_SIZE = ("min_pixels", "max_pixels", "resized_height", "resized_width")
DEPTH = 32  # of lists and objects in a tool call
OPTIONS = {
    "text": (),
    "image": _SIZE,
    "video": (*_SIZE, "total_pixels", "fps", "min_frames", "max_frames", "nframes"),
}
# OpenAI's names of content types
TYPES = {kind: kind for kind in OPTIONS} | {
    "image_url": "image",
    "video_url": "video",
    "input_text": "text",
    "input_image": "image",
}
# keys for the image or video of an item, besides "image" and "video"
_SOURCES = ("url", "path", "base64")


@dataclass(frozen=True)
class Media:
    """An image or video of a conversation.

    Attributes:
      kind: "image" or "video".
      where: its position, for errors.
      options: its own processing options.
    """

    kind: str
    source: Any
    where: str
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.where} ({self.kind}: {describe(self.source)})"


@dataclass(frozen=True)
class Conversation:
    """A validated conversation.

    Attributes:
      messages, tools: plain data for the template.
      media: images and videos in text order.
    """

    messages: list[dict]
    media: list[Media]
    tools: list[dict] | None = None


def split_batch(messages: object) -> tuple[list, bool]:
    """Return a list of conversations, and whether the caller passed several."""
    if not isinstance(messages, list | tuple):
        raise InfiniteVLError(
            f"messages is a {type(messages).__name__}, not a list",
            'pass [{"role": "user", "content": "..."}], or a list of such conversations',
        )
    if not messages:
        raise InfiniteVLError("messages is empty", "pass at least one message")
    several = isinstance(messages[0], list | tuple)
    return (list(messages) if several else [messages]), several


def read_conversation(
    messages: Sequence[dict],
    where: str,
    placeholders: dict[str, str],
    tools: Sequence[dict] | None = None,
) -> Conversation:
    """Validate a conversation.

    Args:
      messages: dicts with "role" and "content". Further keys (tool_calls, name, ...) are plain data
        for the template.
      where: name of the conversation, for errors.
      placeholders: tokens of "image" and "video", which only assistant text may contain.
      tools: JSON schemas of functions for the template.
    """
    if not isinstance(messages, list | tuple) or not messages:
        state = "empty" if isinstance(messages, list | tuple) else "not a list of messages"
        raise InfiniteVLError(f"{where} is {state}", "pass at least one message, in a list")
    plain: list[dict] = []
    media: list[Media] = []
    for number, message in enumerate(messages):
        spot = f"{where}[{number}]"
        if not isinstance(message, dict) or "role" not in message:
            raise InfiniteVLError(
                f"{spot} is not a message: {_kind(message)}",
                'write {"role": "user", "content": ...}',
            )
        role, content = message["role"], message.get("content")
        if not isinstance(role, str) or role not in ROLES:
            raise InfiniteVLError(
                f"{spot} has the unknown role {_kind(role)}", f"use one of {', '.join(ROLES)}"
            )
        read = _Text(placeholders, said=role == "assistant")
        if isinstance(content, str):
            content = read.text(content, spot)
        elif isinstance(content, list | tuple):
            parts = [
                _read_part(part, f"{spot}.content[{i}]", media, read)
                for i, part in enumerate(content)
            ]
            # Templates of text models accept strings only; join a list of texts.
            texts = [part["text"] for part in parts if part["type"] == "text"]
            content = read.text("".join(texts), spot) if len(texts) == len(parts) else parts
        elif not (content is None and message.get("tool_calls")):
            raise InfiniteVLError(
                f"{spot} has content of type {type(content).__name__}",
                "make it a string or a list of text, image and video items",
            )
        # Data sets flattened into columns have every key in every message; drop None values.
        others = {
            key: value
            for key, value in message.items()
            if key not in ("role", "content") and value is not None
        }
        plain.append({"role": role, "content": content, **read.plain(others, spot)})
        _check_calls(plain[-1], spot)
    return Conversation(plain, media, _read_tools(tools, placeholders))


@dataclass(frozen=True)
class _Text:
    """Checks texts and plain data of a message.

    Attributes:
      said: assistant text, in which control tokens are plain words.
    """

    placeholders: dict[str, str]
    said: bool = False

    def text(self, text: str, where: str) -> str:
        check_unicode(text, where)
        if self.said:
            return guard(text)
        check_spelling(text, where, self.placeholders)
        return text

    def plain(self, value: object, where: str, depth: int = 0) -> Any:
        """Copy JSON-like data and check its texts."""
        if depth > DEPTH:
            raise InfiniteVLError(
                f"{where} is more than {DEPTH} lists or objects deep", "reduce the nesting"
            )
        if isinstance(value, str):
            return self.text(value, where)
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, list | tuple):
            return [self.plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {
                self.text(key, where): self.plain(item, f"{where}.{key}", depth + 1)
                for key, item in value.items()
            }
        raise InfiniteVLError(
            f"{where} is of type {type(value).__name__}",
            "use texts, numbers, lists and objects with texts as keys, as in JSON",
        )


def _check_calls(message: dict, where: str) -> None:
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(
        isinstance(c, dict) and isinstance(c.get("function", c), dict) for c in calls
    ):
        raise InfiniteVLError(
            f"{where}.tool_calls is {_kind(calls)}",
            'write [{"type": "function", "function": {"name": ..., "arguments": {...}}}]',
        )


def _read_tools(tools: Sequence[dict] | None, placeholders: dict[str, str]) -> list[dict] | None:
    if tools is None:
        return None
    cure = (
        'pass a list of {"type": "function", "function": {"name": ..., "description": ...,'
        ' "parameters": <JSON schema>}}'
    )
    if not isinstance(tools, list | tuple):
        raise InfiniteVLError(f"tools is of type {type(tools).__name__}", cure)
    read = [_Text(placeholders).plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    for i, tool in enumerate(read):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if (
            not isinstance(inner, dict)
            or not isinstance(inner.get("name"), str)
            or not inner["name"]
        ):
            raise InfiniteVLError(f"tools[{i}] has no name: {_kind(tool)}", cure)
    return read or None


def check_call(
    *,
    padding_side: object = None,
    max_length: object = None,
    turns: object = "all",
    add_generation_prompt: object = True,
) -> None:
    """Raise InfiniteVLError for an invalid option of a processor call."""
    if padding_side is not None and (
        not isinstance(padding_side, str) or padding_side not in ("left", "right")
    ):
        raise InfiniteVLError(
            f"padding_side is {shown(padding_side)}", 'use "left" (for generation) or "right"'
        )
    if max_length is not None and (
        isinstance(max_length, bool)
        or not isinstance(max_length, int | np.integer)
        or max_length < 1
    ):
        raise InfiniteVLError(
            f"max_length is {shown(max_length)}",
            "give tokens, an integer of 1 or more, or None for no limit",
        )
    if not isinstance(turns, str) or turns not in ("last", "all"):
        raise InfiniteVLError(f"turns is {shown(turns)}", 'use "last" or "all"')
    if not isinstance(add_generation_prompt, bool | np.bool_):
        raise InfiniteVLError(
            f"add_generation_prompt is {shown(add_generation_prompt)}", "give True or False"
        )


def _read_part(part: object, where: str, media: list[Media], read: _Text) -> dict:
    if not isinstance(part, dict) or "type" not in part:
        raise InfiniteVLError(
            f"{where} is not a content item: {_kind(part)}",
            'write {"type": "text", "text": ...} (or image, video)',
        )
    if not isinstance(part["type"], str) or part["type"] not in TYPES:
        raise InfiniteVLError(
            f"{where} has the unknown type {_kind(part['type'])}",
            f"use one of {', '.join(OPTIONS)}",
        )
    kind = TYPES[part["type"]]
    if kind == "text":
        source, used = part.get("text"), {"text"}
    else:
        source, used = _source(part, kind, where)
    if source is None:
        given = ", ".join(str(key) for key in part if key != "type") or "nothing"
        raise InfiniteVLError(
            f"{where} is of type {part['type']} but has no {kind!r} (it has: {given})",
            f'write {{"type": "{kind}", "{kind}": ...}}',
        )
    # Data sets flattened into columns have every key in every item; drop None values.
    options = {
        key: value
        for key, value in part.items()
        if key not in {"type", *used} and value is not None
    }
    unknown = [str(key) for key in options if key not in OPTIONS[kind]]
    if unknown:
        known = (
            f"{kind} takes: {', '.join(OPTIONS[kind])}"
            if OPTIONS[kind]
            else f"{kind} takes no options"
        )
        raise InfiniteVLError(f"{where} has the unknown option {', '.join(unknown)}", known)
    if kind == "text":
        if not isinstance(source, str):
            raise InfiniteVLError(
                f"{where} has text of type {type(source).__name__}", "make it a string"
            )
        return {"type": "text", "text": read.text(source, where)}
    media.append(Media(kind, source, where, options))
    return {"type": kind, kind: where}  # templates look at the keys only


def _source(part: dict, kind: str, where: str) -> tuple[object, set[str]]:
    """The source of an item's image or video, and the keys that give it; (None, ...) if missing."""
    names = (kind, f"{kind}_url", *_SOURCES)
    given = [name for name in names if part.get(name) is not None]
    if len(given) != 1:
        if given:
            raise InfiniteVLError(f"{where} has {' and '.join(given)}", f"give one {kind} per item")
        return None, set()
    source, used = part[given[0]], {given[0]}
    if given[0] == kind:
        return source, used
    detail = part.get("detail")
    if given[0] == f"{kind}_url":
        if isinstance(source, dict):
            if unknown := [str(key) for key in source if key not in ("url", "detail")]:
                raise InfiniteVLError(
                    f"{where}.{given[0]} has the unknown key {', '.join(unknown)}",
                    f'write {{"{given[0]}": {{"url": ...}}}}',
                )
            source, detail = source.get("url"), source.get("detail", detail)
        used |= {"detail"}
        if not (detail is None or (isinstance(detail, str) and detail == "auto")):
            raise InfiniteVLError(
                f"{where} asks for detail {shown(detail)}, which this model does not know",
                "set min_pixels and max_pixels instead",
            )
    if not isinstance(source, str | Path):
        raise InfiniteVLError(
            f"{where} has {given[0]} of type {type(source).__name__}",
            f"make it a string, or pass the {kind} as {kind!r}",
        )
    if given[0] == "path":
        return Path(source), used  # never read as a URL
    return (f"data:;base64,{source}" if given[0] == "base64" else source), used


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(str(key) for key in value) or '(none)'}"[:200]
    return shown(value)[:80]
