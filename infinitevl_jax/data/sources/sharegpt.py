"""LLaMA-Factory's rows: `conversations` (from, value) or `messages` (role, content) with the
columns `images`, `videos`, `system` and `tools`. TRL's rows, whose content is a list of items, of
which images come from the column."""

from typing import Any

import msgspec

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation
from infinitevl_jax.data.media import Media, Placeholders
from infinitevl_jax.data.sources import Source, register_source
from infinitevl_jax.data.sources.files import open_rows
from infinitevl_jax.errors import InfiniteVLError, shown
from infinitevl_jax.reading import decode_json

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system", "observation": "tool", "tool": "tool", "function_call": "call"}


class Said(msgspec.Struct):
    """A turn of `conversations`."""

    from_: str = msgspec.field(name="from")
    value: str


class Message(msgspec.Struct):
    """A turn of `messages`."""

    role: str
    content: str | list[dict[str, Any]]


class Row(msgspec.Struct):
    """A conversation. Other keys mean nothing."""

    conversations: list[Said] | None = None
    messages: list[Message] | None = None
    images: Any = None
    videos: Any = None
    image: Any = None  # of other formats, refused
    video: Any = None
    system: str | None = None
    tools: Any = None


def conversation(row: Row, media: Media) -> Conversation:
    """The row's messages."""
    if (row.conversations is None) == (row.messages is None):
        given = "neither" if row.messages is None else "both"
        raise InfiniteVLError(f"it has {given} conversations and messages", "give one of them")
    for noun in ("image", "video"):
        if getattr(row, noun) is not None:
            raise InfiniteVLError(
                f"it has the key {noun}, which rows of the kind sharegpt do not have",
                f"train.data.kind=llava reads it with conversations; or call the column {noun}s",
            )
    places = Placeholders(media.sources(row.images, "image"), media.sources(row.videos, "video"))
    turns = [(t.from_, t.value) for t in row.conversations or ()]
    turns += [(m.role, m.content) for m in row.messages or ()]
    messages: list[dict[str, Any]] = []
    if row.system:
        messages.append({"role": "system", "content": row.system})
    for i, (name, text) in enumerate(turns):
        role = ROLES.get(name)
        if role is None:
            raise InfiniteVLError(f"turn {i} is from {name!r}", f"use one of {', '.join(ROLES)}")
        if role == "call":
            messages.append({"role": "assistant", "content": None, "tool_calls": _calls(text, i)})
        else:
            messages.append({"role": role, "content": _content(text, role, places)})
    places.check()
    return Conversation(messages, _tools(row.tools))


def _content(
    content: str | list[dict[str, Any]], role: str, places: Placeholders
) -> str | list[dict[str, Any]]:
    """A turn's content with its images and videos."""
    if isinstance(content, str):
        return places.fill(content) if role in ("user", "tool") else content
    items = [
        places.take(item["type"]) if item.get("type") in ("image", "video") else item
        for item in content
    ]
    return [item for item in items if item is not None]


def _calls(text: str | list[dict[str, Any]], turn: int) -> list[dict[str, Any]]:
    """Tool calls of a function_call turn: an object with name and arguments, or a list of them."""
    if not isinstance(text, str):
        raise InfiniteVLError(
            f"the function call of turn {turn} is {shown(text)}",
            'write its JSON as text: "{\\"name\\": ..., \\"arguments\\": {...}}"',
        )
    found = decode_json(text, Any, f"the function call of turn {turn}")
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise InfiniteVLError(
            f"the function call of turn {turn} is {shown(found)}",
            'write {"name": ..., "arguments": {...}}',
        )
    return [{"type": "function", "function": call} for call in calls]


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        tools = decode_json(tools, Any, "tools") if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise InfiniteVLError(f"tools is {shown(tools)}", "give a list of functions, or its JSON")
    return tools or None


def open_sharegpt(config: SourceConfig, split: str) -> Source:
    """Open a JSON, JSONL or parquet file of such rows."""
    return open_rows(config, split, Row, conversation)


register_source("sharegpt", open_sharegpt)
