"""Mutations of JSON: of the values, the keys and the text that spells them."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

HUGE_DIGITS = "9" * 5000
NUMBERS = [0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**9, 10**30, 1e308, -0.5, 0.5, 1.5]
NUMBERS += [float("nan"), float("inf"), float("-inf"), 5e-324, -0.0]
TEXTS = [
    "",
    "x",
    "1",
    "32",
    "a" * 5000,
    "\0",
    "\x1b[2J\x1b]0;x\a",
    "line\nline",
    "../../etc/passwd",
    "/etc/passwd",
]
TEXTS += [
    "\ud83d",
    "\u202e\u2066",
    "\ufeff",
    "null",
    "NaN",
    "(.*)*x",
    "(",
    "%s{}",
    "é" * 300,
    "a/b",
    ".",
    "..",
]
OTHERS = [
    None,
    True,
    False,
    [],
    [1],
    [[1]],
    [1, 2],
    ["a"],
    [None],
    {},
    {"a": 1},
    {"a": {"b": 1}},
    [{}],
    [32, 32],
    [0, 0],
]
BAD = [*NUMBERS, *TEXTS, *OTHERS]


def read(path: Path) -> Any:
    """The JSON in a file, read as leniently as can be; {} where there is none."""
    if not path.exists():
        return {}
    text = path.read_bytes().decode("utf-8-sig", "replace")
    return json.loads(
        text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else float(digits)
    )


class Raw(str):
    """JSON text that stands for a value as it is."""


@dataclass
class Mutated:
    """JSON bytes, what was done (`label`), and where.

    `path` of keys, with the new `value` (None where it is no value).
    """

    data: bytes
    label: str
    path: tuple
    value: Any = None


def paths(tree: Any, before: tuple = ()) -> list[tuple]:
    """Every place in a tree of dicts and lists, the root included.

    Of a long list the first places only.
    """
    found = [before]
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree[:8])
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        found += paths(value, (*before, key))
    return found


def at(tree: Any, path: tuple) -> Any:
    """The value at a place."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: tuple, value: Any) -> Any:
    """The tree with another value at a place.

    The tree itself is changed unless the place is its root.
    """
    if not path:
        return value
    at(tree, path[:-1])[path[-1]] = value
    return tree


def dump(tree: Any) -> bytes:
    """JSON text of a tree, NaN, lone surrogates and Raw pieces included."""
    pieces: list[str] = []

    def spell(value):
        if isinstance(value, Raw):
            pieces.append(str(value))
            return f"\u0001{len(pieces) - 1}\u0001"
        if isinstance(value, dict):
            return {key: spell(inner) for key, inner in value.items()}
        return [spell(inner) for inner in value] if isinstance(value, list | tuple) else value

    text = json.dumps(spell(tree))
    for number, piece in enumerate(pieces):
        text = text.replace(f'"\\u0001{number}\\u0001"', piece)
    return text.encode()


def nested(rng: Random) -> Raw:
    """A value that is deeper than a reader can follow, or only deep."""
    depth, (start, end) = rng.choice([60, 2000, 200_000]), rng.choice([("[", "]"), ('{"a":', "}")])
    return Raw(start * depth + "1" + end * depth)


def near(rng: Random, value: Any) -> Any:
    """A value of the same type that is not the same."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(
            [
                value + 1,
                value - 1,
                value * 2,
                -value,
                value // 2,
                value * 1000,
                float(value),
                value + 0.5,
                str(value),
            ]
        )
    if isinstance(value, float):
        return rng.choice([value * 2, -value, value / 3, int(value), str(value), value * 1e30])
    if isinstance(value, str):
        return rng.choice(
            [value + "x", value[:-1], value.upper(), value + " ", value * 50, value + "\0", [value]]
        )
    if isinstance(value, list):
        return rng.choice(
            [
                value + value,
                value[:-1],
                value[::-1],
                value[:1],
                [value],
                tuple(value) + (None,),
                value * 1000,
            ]
        )
    if isinstance(value, dict):
        keys = list(value)
        return rng.choice(
            [
                list(value.items()),
                {k: value[k] for k in keys[1:]},
                {k: value[k] for k in keys[::-1]},
                [value],
            ]
        )
    return rng.choice(BAD)


def bad(rng: Random, value: Any) -> Any:
    """A value that does not fit in the place of `value`: half of the time one of its own kind."""
    same = (
        NUMBERS
        if isinstance(value, int | float) and not isinstance(value, bool)
        else TEXTS
        if isinstance(value, str)
        else BAD
    )
    return rng.choice(same if rng.random() < 0.5 else BAD)


def mutate(
    rng: Random, tree: Any, *, focus: list[tuple] | None = None, keys: tuple[str, ...] = ()
) -> Mutated:
    """One mutation of a JSON tree (sometimes two).

    Args:
      focus: places that half of the mutations go to; by default every place is as likely.
      keys: names that a reader may know and the tree lacks.
    """
    tree = copy.deepcopy(tree)
    if rng.random() < 0.1:
        first = mutate(rng, tree, focus=focus, keys=keys)
        try:
            tree = json.loads(first.data)
        except (ValueError, RecursionError):
            return first
        second = mutate(rng, tree, focus=None, keys=keys)
        return Mutated(second.data, f"{first.label}; {second.label}", (), None)
    places = [p for p in paths(tree) if p]
    path = rng.choice(focus if focus and rng.random() < 0.5 else places) if places else ()
    name = ".".join(map(str, path))
    kind = rng.choice(
        ["bad"] * 5
        + ["near"] * 3
        + ["drop", "double", "unknown", "known", "deep", "digits", "rename", "swap", "root", "text"]
    )
    if kind == "bad":
        value = bad(rng, at(tree, path))
        return Mutated(dump(put(tree, path, value)), f"{name} = {value!r:.60}", path, value)
    if kind == "near":
        value = near(rng, at(tree, path))
        return Mutated(dump(put(tree, path, value)), f"{name} = {value!r:.60}", path, value)
    if kind in ("deep", "digits"):
        value = nested(rng) if kind == "deep" else Raw(rng.choice(["", "-", "0."]) + HUGE_DIGITS)
        return Mutated(
            dump(put(tree, path, value)),
            f"{name} = {value[:12]}... ({len(value)} characters)",
            path,
            value,
        )
    if kind == "root" or not path:
        value = rng.choice(OTHERS + [1, "x", [tree]])
        return Mutated(dump(value), f"the root is {value!r:.40}", (), value)
    if kind == "text":
        data, label = spelled(rng, dump(tree))
        return Mutated(data, label, ())
    parent, key = at(tree, path[:-1]), path[-1]
    if kind in ("unknown", "known"):
        where = parent if isinstance(parent, dict) else tree if isinstance(tree, dict) else {}
        new = (
            rng.choice(keys)
            if kind == "known" and keys
            else rng.choice(["zzz", "", "\0", "é", "a.b", "__class__", "self"])
        )
        where[new] = value = rng.choice(BAD)
        return Mutated(dump(tree), f"new key {new!r} = {value!r:.50}", (*path[:-1], new), value)
    if kind == "swap":
        other = rng.choice(places)
        if other[: len(path)] != path and path[: len(other)] != other:
            a, b = at(tree, path), at(tree, other)
            put(put(tree, path, b), other, a)
            return Mutated(dump(tree), f"{name} <-> {'.'.join(map(str, other))}", path, b)
    if kind == "double" and isinstance(parent, dict):
        text = dump(parent).decode()
        twin = Raw(text[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(BAD))}}}")
        return Mutated(dump(put(tree, path[:-1], twin)), f"{name} twice", path)
    if kind == "rename" and isinstance(parent, dict):
        parent[rng.choice([key.upper(), key + " ", key[:-1], "\ufeff" + key, key + "\0"])] = (
            parent.pop(key)
        )
        return Mutated(dump(tree), f"{name} renamed", path)
    del parent[key]
    return Mutated(dump(tree), f"{name} dropped", path)


def spelled(rng: Random, data: bytes) -> tuple[bytes, str]:
    """The same JSON, spelled in another way or not quite JSON."""
    ways = {
        "UTF-8 with BOM": b"\xef\xbb\xbf" + data,
        "UTF-16": data.decode().encode("utf-16"),
        "not UTF-8": data.replace(b"e", b"\xff", 1),
        "trailing comma": data[:-1] + b"," + data[-1:],
        "comment": b"// x\n" + data,
        "two documents": data + data,
        "single quotes": data.replace(b'"', b"'"),
        "nothing": b"",
        "blanks only": b" \n" * 9,
        "blanks around": b"\n\n " + data + b" \n",
        "carriage returns": data.replace(b", ", b",\r\n"),
        "cut": data[: rng.randrange(len(data) + 1)],
        "junk after": data + b"\0",
    }
    label = rng.choice(list(ways))
    return ways[label], label
