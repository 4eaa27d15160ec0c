"""Conversations as callers hand them over: of Python objects, some of them JSON."""

import copy
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from tiny_folder import IDS

from infinitevl_jax import Processor

from ..case import Case, Place
from ..content import ODD_TEXT, mutate_text
from ..values import BAD, at, near, paths, put
from . import processors
from .processors import picture, prompt_ids

CONVERSATIONS: list[Callable[[], list]] = [
    lambda: [{"role": "user", "content": "what is it?"}],
    lambda: [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
    ],
    lambda: [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": picture()},
                {"type": "text", "text": "and this?"},
            ],
        }
    ],
    lambda: [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": [picture(), picture()], "fps": 2.0},
                {"type": "text", "text": "x"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a film"}]},
    ],
    lambda: [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(), "min_pixels": 64, "max_pixels": 128}],
        }
    ],
]


class Text(str):
    """Text of a type of its own."""


def odd_objects() -> list[Any]:
    """What else may stand where a value is expected."""
    array = np.zeros((4, 6, 3), np.uint8)
    return [
        object(), b"bytes", bytearray(b"x"), memoryview(b"x"), np.array(["x"]),
        np.array([{"role": "user", "content": "a"}]), np.str_("numpy"), np.int64(3), np.float32(2),
        {1, 2}, frozenset(), iter([1]), (x for x in "ab"), range(3), lambda: 1, int, Text("own"),
        3 + 4j, slice(1), Path("/etc/passwd"), Path("no.png"), array, array.astype(float),
        array[..., 0], array[None], np.zeros((0, 4, 3), np.uint8), picture(),
        Image.new("La", (9, 9)), Image.new("F", (9, 9)), Image.new("RGB", (0, 4)),
        Image.new("RGB", (1, 900)), [picture(), picture(5, 5)], [array, "x"],
        {"url": "http://127.0.0.1:9/x.png"}, "http://127.0.0.1:9/x.png", "file:///etc/passwd",
        "data:image/png;base64,é", "data:,", "data:image/png;base64,AAAA", "/dev/zero",
        "/proc/self/mem", "/", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>",
        [{"type": "text", "text": "x"}] * 1000, float("nan"), 10**400, -(2**63), *ODD_TEXT,
    ]  # fmt: skip


KEYS = (
    "name",
    "tool_calls",
    "tool_call_id",
    "tools",
    "weight",
    "train",
    "type",
    "text",
    "image",
    "video",
    "image_url",
    "url",
    "path",
    "content",
    "role",
)
KEYS += (
    "min_pixels",
    "max_pixels",
    "resized_height",
    "resized_width",
    "fps",
    "nframes",
    "min_frames",
    "max_frames",
    "total_pixels",
    "video_start",
)
PICTURES = [IDS["<|image_pad|>"], IDS["<|video_pad|>"]]
_PROCESSORS: dict[Path, Processor] = {}


def processor(place: Place) -> Processor:
    folder = place.original("bytes-only", processors.bytes_only)
    if folder not in _PROCESSORS:
        _PROCESSORS[folder] = Processor.from_pretrained(folder)
    return _PROCESSORS[folder]


def make(rng: Random, place: Place) -> Case:
    messages = rng.choice(CONVERSATIONS)()
    training = messages[-1]["role"] == "assistant"
    label = change(rng, messages)
    if isinstance(label, tuple):
        messages, label = label
    words, kept = processor(place), _plain(messages)
    use = rng.choice(["encode_example", "call"]) if training else "call"
    action = (
        (lambda: words.encode_example(messages))
        if use == "encode_example"
        else (lambda: words(messages))
    )
    return Case(f"{use}: {label:.150}", action, lambda found: _check(found, kept, use == "call"))


def change(rng: Random, messages: list) -> Any:
    """One change in place (its label), or (new messages, label)."""
    places = [p for p in paths(messages) if p]
    path = rng.choice(places)
    name, parent = ".".join(map(str, path)), at(messages, path[:-1])
    kind = rng.choice(
        ["bad"] * 3
        + ["odd"] * 3
        + [
            "near",
            "drop",
            "new",
            "new",
            "double",
            "root",
            "text",
            "text",
            "deep",
            "circle",
            "nothing",
        ]
    )
    texts = [p for p in places if isinstance(at(messages, p), str)]
    if kind == "text":
        path = rng.choice([p for p in texts if p[-1] in ("content", "text")] or texts)
        value, label = mutate_text(rng, at(messages, path))
        put(messages, path, value)
        return f"{'.'.join(map(str, path))}: {label}"
    if kind == "drop":
        del parent[path[-1]]
        return f"{name} dropped"
    if kind == "double":
        messages.append(copy.copy(messages[-1]))
        return "the last message twice"
    if kind == "new":
        where = parent if isinstance(parent, dict) else messages[0]
        key, value = rng.choice([*KEYS, 3, None]), rng.choice([*BAD, *odd_objects()])
        where[key] = value
        return f"{name[:-1]}: new key {key!r} = {value!r:.60}"
    if kind == "root":
        wrapped = rng.choice(
            [
                tuple(messages),
                messages * 200,
                [messages],
                [messages, messages],
                {"messages": messages},
                np.array(messages),
                iter(messages),
            ]
        )
        wrapped = rng.choice([wrapped, rng.choice([*BAD, *odd_objects()])])
        return wrapped, f"messages is {wrapped!r:.60}"
    if kind == "nothing":
        return "nothing"
    if kind == "deep":
        value: Any = "x"
        for _ in range(rng.choice([50, 100_000])):
            value = [value]
    elif kind == "circle":
        value = messages
    else:
        value = (
            rng.choice(BAD if kind == "bad" else odd_objects())
            if kind != "near"
            else near(rng, at(messages, path))
        )
    put(messages, path, value)
    return f"{name} = {kind if kind in ('deep', 'circle') else repr(value)[:60]}"


def _plain(messages: Any, several: bool = True) -> list[list[dict]] | None:
    """The conversations, where they are all well formed.

    None where something in them is no conversation.
    """
    if not isinstance(messages, list | tuple) or not messages:
        return None
    if several and isinstance(messages[0], list | tuple):
        found = [_plain(one, several=False) for one in messages]
        return None if None in found else [one for conversations in found for one in conversations]
    for message in messages:
        if not isinstance(message, dict) or not set(message) >= {"role", "content"}:
            return None
        content = message["content"]
        if isinstance(content, list | tuple):
            if not all(
                isinstance(p, dict)
                and isinstance(p.get("type"), str)
                and p.get(p["type"]) is not None
                for p in content
            ):
                return None
            if not all(isinstance(p["text"], str) for p in content if p["type"] == "text"):
                return None
        elif not isinstance(content, str):
            return None
    return [list(messages)]


def _check(found: dict, conversations: list[list[dict]] | None, answer: bool) -> str:
    """Each prompt is Qwen's chat format of its messages, pictures' placeholders grown to
    their tokens.
    """
    if conversations is None:
        return "accepted what is no conversation"
    rows, mask = (
        np.atleast_2d(found["input_ids"]),
        np.atleast_2d(found.get("attention_mask", found["input_ids"] >= 0)),
    )
    if len(rows) != len(conversations):
        return f"{len(rows)} rows for {len(conversations)} conversations"
    for row, seen, messages in zip(rows, mask, conversations, strict=True):
        ids = row[seen.astype(bool)].tolist()
        plain = [
            m if isinstance(m["content"], str) else {**m, "content": list(m["content"])}
            for m in messages
        ]
        single = [i for n, i in enumerate(ids) if not (i in PICTURES and n and ids[n - 1] == i)]
        if single != prompt_ids(plain, answer):
            return f"another prompt: {bytes(i for i in single if i < 256)!r:.150}"
    arrays = [v for k, v in found.items() if k.startswith("pixel")]
    if any(not np.isfinite(v).all() for v in arrays):
        return "NaN in pictures"
    return (
        ""
        if sum(len(v) // 4 for v in arrays) == np.isin(rows, PICTURES).sum()
        else "pictures and placeholders differ in number"
    )
