"""Files of conversations, in every format and kind of file, up to what is packed."""

import copy
import json
from pathlib import Path
from random import Random

from tiny_folder import tiny_config

from infinitevl_jax.config.data import DataConfig, SourceConfig
from infinitevl_jax.data.conversation import Conversation
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.sources import open_source
from infinitevl_jax.errors import BadRow

from ..case import Case, Place
from ..content import encode, mutate_bytes, mutate_file, mutate_text
from ..values import at, bad, near, paths, put
from . import processors
from .messages import processor

USER, GPT = {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}
PARTS = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"}]
SAID = {"role": "assistant", "content": "A cat."}
ROWS = {
    "llava": {"image": "a.png", "conversations": [USER, GPT]},
    "sharegpt": {"images": ["a.png"], "conversations": [USER, GPT], "system": "Be kind."},
    "openai": {"messages": [{"role": "user", "content": PARTS}, SAID], "tools": None},
    "questions": {"image": "a.png", "questions": ["What?", "Red?"], "answers": ["A cat.", "no"]},
    "text": {"text": "Once upon a time.\n" * 5},
}
NAMES = [
    "../secret.png",
    "/etc/passwd",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x",
    "data:image/png;base64,AAAA",
    "a.png\0b",
    "sub/../../secret.png",
    ".",
    "",
    "a" * 5000,
]


def make(rng: Random, place: Place) -> Case:
    kind = rng.choice(sorted(ROWS))
    lines = rng.random() < 0.6
    folder = place.work / "input"
    folder.mkdir(parents=True)
    processors.picture().save(folder / "a.png")
    processors.picture().save(folder.parent / "secret.png")
    rows = [copy.deepcopy(ROWS[kind]) for _ in range(4)]
    row, how = (
        rng.randrange(4),
        rng.choice(["value"] * 4 + ["name", "text", "bytes", "bytes", "file"]),
    )
    key = rng.choice([p for p in paths(rows[row]) if p])
    if how == "value":
        old = at(rows[row], key)
        value = bad(rng, old) if rng.random() < 0.6 else near(rng, old)
        rows[row] = put(rows[row], key, value)
        label = f"{key} = {value!r:.60}"
    elif how == "name" and kind != "text":
        name = rng.choice(NAMES)
        text = json.dumps(rows[row]).replace('"a.png"', json.dumps(name))
        rows[row], label = json.loads(text), f"the image is {name!r:.60}"
    else:
        label = how
    texts = [_dumps(r) for r in rows]
    if how == "text":
        texts[row], label = mutate_text(rng, texts[row])
    path = folder / ("rows.jsonl" if lines else "rows.json")
    data = encode("\n".join(texts) + "\n" if lines else "[" + ", ".join(texts) + "]")
    if how == "bytes":
        data, label = mutate_bytes(rng, data)
    path.write_bytes(data)
    if how == "file":
        label = mutate_file(rng, path, place.work / "outside")
    words = processor(place)

    def action():
        source = open_source(SourceConfig(kind=kind, path=str(path)), "train")
        encoder = Encoder(source, words, tiny_config()).within(DataConfig(patches=64))
        found = []
        for number in range(len(source)):
            try:
                found.append((source[number], encoder.pieces(number)))
            except BadRow as error:
                found.append((error, []))
        return found

    whole = lines and how in ("value", "name")

    def check(found):
        return _check(found, kind, row if whole else None, folder)

    return Case(f"{kind} {path.suffix}: {label}", action, check)


def _dumps(row) -> str:
    try:
        return json.dumps(row)
    except (TypeError, ValueError, RecursionError):  # what JSON lacks
        return "null"


def _check(found: list, kind: str, row: int | None, folder: Path) -> str:
    """The other rows are as they were; images lie in the folder; something is learnt of each."""
    expected = len(ROWS[kind]["conversations"]) if "conversations" in ROWS[kind] else 0
    for number, (conversation, pieces) in enumerate(found):
        if isinstance(conversation, BadRow):
            if row is not None and number != row:
                return f"row {number} is refused, and row {row} is bad: {conversation}"
            continue
        if not isinstance(conversation, Conversation) or not pieces:
            return f"row {number} is {conversation!r:.60}"
        for message in conversation.messages:
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                image = part.get("image") if isinstance(part, dict) else None
                if isinstance(image, Path) and not image.is_relative_to(folder.absolute()):
                    return f"an image outside of the folder: {image}"
        if not all(piece.branch.answer.any() for piece in pieces):
            return f"nothing is learnt of row {number}"
        if row is not None and number != row and kind in ("llava", "sharegpt"):
            if len([m for m in conversation.messages if m["role"] != "system"]) != expected:
                return f"row {number} has other turns"
    if row is not None and len(found) != 4:
        return f"{len(found)} rows of 4"
    return ""
