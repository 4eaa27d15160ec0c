"""LLaVA's rows: {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is
this?"}, {"from": "gpt", "value": "A cat."}]}."""

from typing import Any

import msgspec

from infinitevl_jax.config.data import SourceConfig
from infinitevl_jax.data.conversation import Conversation
from infinitevl_jax.data.media import Media, Placeholders
from infinitevl_jax.data.sources import Source, register_source
from infinitevl_jax.data.sources.files import open_rows
from infinitevl_jax.errors import InfiniteVLError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system"}


class Turn(msgspec.Struct):
    """A turn of a conversation."""

    from_: str = msgspec.field(name="from")
    value: str


class Row(msgspec.Struct):
    """A conversation about some images and videos. Other keys, such as id, mean nothing."""

    conversations: list[Turn]
    image: Any = None
    video: Any = None


def conversation(row: Row, media: Media) -> Conversation:
    """The row's messages. Line breaks beside <image> and <video> are left out."""
    places = Placeholders(media.sources(row.image, "image"), media.sources(row.video, "video"))
    messages = []
    for i, turn in enumerate(row.conversations):
        role = ROLES.get(turn.from_)
        if role is None:
            raise InfiniteVLError(
                f"turn {i} is from {turn.from_!r}", f"use one of {', '.join(ROLES)}"
            )
        content = places.fill(turn.value, strip=True) if role == "user" else turn.value
        messages.append({"role": role, "content": content})
    places.check()
    return Conversation(messages)


def open_llava(config: SourceConfig, split: str) -> Source:
    """Open a JSON, JSONL or parquet file of such rows."""
    return open_rows(config, split, Row, conversation)


register_source("llava", open_llava)
