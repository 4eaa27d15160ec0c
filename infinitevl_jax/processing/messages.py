"""Conversations as people write them, checked, and split into what the template reads and what has to be decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing.sources import describe

ROLES = ("system", "user", "assistant", "tool")
_SIZE = ("min_pixels", "max_pixels", "resized_height", "resized_width")
OPTIONS = {
    "text": (),
    "image": _SIZE,
    "video": (*_SIZE, "total_pixels", "fps", "min_frames", "max_frames", "nframes"),
}
# Content items by other names: OpenAI's chat and responses interfaces.
TYPES = {kind: kind for kind in OPTIONS} | {
    "image_url": "image",
    "video_url": "video",
    "input_text": "text",
    "input_image": "image",
}
# Keys under which an item may hold its picture or video, besides "image" or "video" themselves.
_SOURCES = ("url", "path", "base64")


@dataclass(frozen=True)
class Media:
    """One picture or video of a conversation: where it stands, what it is, and its own options."""

    kind: str  # "image" or "video"
    source: object
    where: str
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.where} ({self.kind}: {describe(self.source)})"


@dataclass(frozen=True)
class Conversation:
    """`messages` hold plain data for the template; `media` are the pictures and videos in the order of the text."""

    messages: list[dict]
    media: list[Media]


def split_batch(messages: object) -> tuple[list, bool]:
    """A list of conversations, and whether the caller passed several rather than one."""
    if not isinstance(messages, list | tuple):
        raise InfiniteVLError(
            f"messages is a {type(messages).__name__}, not a list",
            'pass [{"role": "user", "content": "..."}], or a list of such conversations',
        )
    if not messages:
        raise InfiniteVLError("messages is empty", "pass at least one message")
    several = isinstance(messages[0], list | tuple)
    return (list(messages) if several else [messages]), several


def read_conversation(messages: Sequence[dict], where: str, placeholders: dict[str, str]) -> Conversation:
    """Check one conversation. `where` opens every error; `placeholders` maps image and video to their tokens, which no text may spell."""
    if not isinstance(messages, list | tuple) or not messages:
        state = "empty" if isinstance(messages, list | tuple) else "not a list of messages"
        raise InfiniteVLError(f"{where} is {state}", "pass at least one message, in a list")
    plain: list[dict] = []
    media: list[Media] = []
    for number, message in enumerate(messages):
        spot = f"{where}[{number}]"
        if not isinstance(message, dict) or "role" not in message:
            raise InfiniteVLError(f"{spot} is not a message: {_kind(message)}", 'write {"role": "user", "content": ...}')
        if not isinstance(message["role"], str) or message["role"] not in ROLES:
            raise InfiniteVLError(f"{spot} has the unknown role {message['role']!r}", f"use one of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, str):
            _check_text(content, spot, placeholders)
        elif isinstance(content, list | tuple):
            parts = [_read_part(part, f"{spot}.content[{i}]", media, placeholders) for i, part in enumerate(content)]
            # Text models' templates know strings only, and a list of texts says the same.
            content = "".join(part["text"] for part in parts) if all(part["type"] == "text" for part in parts) else parts
        elif not (content is None and message.get("tool_calls")):
            raise InfiniteVLError(
                f"{spot} has content of type {type(content).__name__}", "make it a string or a list of text, image and video items"
            )
        plain.append({**message, "content": content})
    return Conversation(plain, media)


def _read_part(part: object, where: str, media: list[Media], placeholders: dict[str, str]) -> dict:
    if not isinstance(part, dict) or "type" not in part:
        raise InfiniteVLError(f"{where} is not a content item: {_kind(part)}", 'write {"type": "text", "text": ...} (or image, video)')
    if not isinstance(part["type"], str) or part["type"] not in TYPES:
        raise InfiniteVLError(f"{where} has the unknown type {part['type']!r}", f"use one of {', '.join(OPTIONS)}")
    kind = TYPES[part["type"]]
    if kind == "text":
        source, used = part.get("text"), {"text"}
    else:
        source, used = _source(part, kind, where)
    if source is None:
        given = ", ".join(str(key) for key in part if key != "type") or "nothing"
        raise InfiniteVLError(
            f"{where} is of type {part['type']} but has no {kind!r} (it has: {given})", f'write {{"type": "{kind}", "{kind}": ...}}'
        )
    # Data sets that were flattened into columns carry every key everywhere, None where it does not apply.
    options = {key: value for key, value in part.items() if key not in {"type", *used} and value is not None}
    unknown = [str(key) for key in options if key not in OPTIONS[kind]]
    if unknown:
        known = f"{kind} takes: {', '.join(OPTIONS[kind])}" if OPTIONS[kind] else f"{kind} takes no options"
        raise InfiniteVLError(f"{where} has the unknown option {', '.join(unknown)}", known)
    if kind == "text":
        if not isinstance(source, str):
            raise InfiniteVLError(f"{where} has text of type {type(source).__name__}", "make it a string")
        _check_text(source, where, placeholders)
        return {"type": "text", "text": source}
    media.append(Media(kind, source, where, options))
    return {"type": kind, kind: where}  # templates look at the keys, never into pictures


def _source(part: dict, kind: str, where: str) -> tuple[object, set[str]]:
    """What stands for the picture or video of an item, and the keys that say it; (None, ...) if there is none."""
    names = (kind, f"{kind}_url", *_SOURCES)
    given = [name for name in names if part.get(name) is not None]
    if len(given) != 1:
        if given:
            raise InfiniteVLError(f"{where} has {' and '.join(given)}", f"give one {kind} an item")
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
                f"{where} asks for detail {detail!r}, which this model does not know",
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


def _check_text(text: str, where: str, placeholders: dict[str, str]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InfiniteVLError(
            f"{where} holds half of a character, {text[error.start]!r}, at place {error.start}",
            "leave it out, or write the whole character",
        ) from None
    for kind, token in placeholders.items():
        if token in text:
            raise InfiniteVLError(
                f"{where} spells out {token} in its text, which stands for {kind} tokens and has no {kind} here",
                f'pass pictures as items, {{"type": "{kind}", "{kind}": ...}}, and take the token out of the text, or space it out',
            )


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return f"a dict with the keys {', '.join(str(key) for key in value) or '(none)'}"[:200]
    return repr(value)[:80]
