"""OpenAI's rows: {"messages": [{"role": ..., "content": text or items}], "tools": [...]}."""

from typing import Any

import msgspec

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation
from infinitevl_jax.data.media import Media
from infinitevl_jax.data.sources import Source, register_source
from infinitevl_jax.data.sources.files import open_rows

SOURCES = {
    "image": ("image", "image_url", "path", "url"),
    "video": ("video", "video_url", "path", "url"),
}
NOUNS = {"image": "image", "image_url": "image", "input_image": "image"}
NOUNS |= {"video": "video", "video_url": "video"}


class Row(msgspec.Struct):
    """A conversation. Other keys mean nothing."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def conversation(row: Row, media: Media) -> Conversation:
    """The row's messages, with the files of the folders."""
    messages = []
    for message in row.messages:
        content = message.get("content")
        if isinstance(content, list):
            message = message | {"content": [_item(item, media) for item in content]}
        messages.append({key: value for key, value in message.items() if value is not None})
    return Conversation(messages, row.tools or None)


def _item(item: Any, media: Media) -> Any:
    """A content item with its file; the processor reports what is wrong with other parts of it."""
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(kind, str) or kind not in NOUNS:
        return item
    noun = NOUNS[kind]
    found = dict(item)
    for key in SOURCES[noun]:
        if found.get(key) is None:
            continue
        value = found.pop(key)
        if key.endswith("_url") and isinstance(value, dict):
            value = value.get("url")
        return {k: v for k, v in found.items() if k != "detail"} | {
            "type": noun,
            noun: media.source(value, noun),
        }
    return item


def open_openai(config: SourceConfig, split: str) -> Source:
    """Open a JSON, JSONL or parquet file of such rows."""
    return open_rows(config, split, Row, conversation)


register_source("openai", open_openai)
