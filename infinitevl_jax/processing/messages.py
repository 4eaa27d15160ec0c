"""Conversations as people write them, checked, and split into what the template reads and what has to be decoded."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing.sources import describe

ROLES = ("system", "user", "assistant", "tool")
_SIZE = ("min_pixels", "max_pixels", "resized_height", "resized_width")
OPTIONS = {
    "text": (),
    "image": _SIZE,
    "video": (*_SIZE, "total_pixels", "fps", "min_frames", "max_frames", "nframes"),
}


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
        raise InfiniteVLError(f"{where} is {'empty' if messages in ([], ()) else 'not a list of messages'}", "pass at least one message")
    plain: list[dict] = []
    media: list[Media] = []
    for number, message in enumerate(messages):
        spot = f"{where}[{number}]"
        if not isinstance(message, dict) or "role" not in message:
            raise InfiniteVLError(f"{spot} is not a message: {_kind(message)}", 'write {"role": "user", "content": ...}')
        if message["role"] not in ROLES:
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
    kind = part["type"]
    if kind not in OPTIONS:
        raise InfiniteVLError(f"{where} has the unknown type {kind!r}", f"use one of {', '.join(OPTIONS)}")
    if part.get(kind) is None:
        given = ", ".join(str(key) for key in part if key != "type") or "nothing"
        raise InfiniteVLError(
            f"{where} is of type {kind} but has no {kind!r} (it has: {given})", f'write {{"type": "{kind}", "{kind}": ...}}'
        )
    # Data sets that were flattened into columns carry every key everywhere, None where it does not apply.
    options = {key: value for key, value in part.items() if key not in ("type", kind) and value is not None}
    unknown = [str(key) for key in options if key not in OPTIONS[kind]]
    if unknown:
        known = f"{kind} takes: {', '.join(OPTIONS[kind])}" if OPTIONS[kind] else f"{kind} takes no options"
        raise InfiniteVLError(f"{where} has the unknown option {', '.join(unknown)}", known)
    if kind == "text":
        if not isinstance(part["text"], str):
            raise InfiniteVLError(f"{where} has text of type {type(part['text']).__name__}", "make it a string")
        _check_text(part["text"], where, placeholders)
        return {"type": "text", "text": part["text"]}
    media.append(Media(kind, part[kind], where, options))
    return {"type": kind, kind: where}  # templates look at the keys, never into pictures


def _check_text(text: str, where: str, placeholders: dict[str, str]) -> None:
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
