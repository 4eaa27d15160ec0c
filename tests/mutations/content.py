"""Mutations of bytes, of text and of the files that hold them."""

import os
import shutil
from pathlib import Path
from random import Random

FOREIGN = {
    "empty": b"",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
    "a web page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a zip": b"PK\3\4" + b"\0" * 60,
    "a pickle": (
        b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x04true\x94\x85\x94R\x94."
    ),
    "zeros": b"\0" * 4096,
    "ones": b"\xff" * 4096,
    "an ELF": b"\x7fELF\2\1\1" + b"\0" * 57,
    "a PDF": b"%PDF-1.7\n1 0 obj <<>> endobj\ntrailer <<>>\n%%EOF",
    "a script": b"#!/bin/sh\ntouch hacked\n",
}
FIELDS = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000]


def mutate_bytes(rng: Random, data: bytes, *, head: int = 0) -> tuple[bytes, str]:
    """One mutation (sometimes several) of bytes.

    `head` counts the bytes at the start that half of the mutations go to.
    """
    if rng.random() < 0.15:
        label = ""
        for _ in range(rng.randrange(2, 5)):
            data, more = mutate_bytes(rng, data, head=head)
            label += ("; " if label else "") + more
        return data, label
    size = len(data)
    if not size:
        return rng.choice(list(FOREIGN.values())), "bytes for nothing"
    place = rng.randrange(min(head, size) if head and rng.random() < 0.5 else size)
    length = min(rng.choice([1, 2, 4, 16, 256, 4096]), size - place)
    kind = rng.choice(
        [
            "cut",
            "flip",
            "flip",
            "byte",
            "byte",
            "zero",
            "insert",
            "drop",
            "double",
            "field",
            "field",
            "foreign",
            "after",
        ]
    )
    if kind == "cut":
        return data[:place], f"cut to {place} of {size} bytes"
    if kind == "foreign":
        name = rng.choice(list(FOREIGN))
        return FOREIGN[name], name
    if kind == "after":
        return (
            data + bytes(rng.randrange(256) for _ in range(length)),
            f"{length} bytes after the end",
        )
    if kind == "field":
        width, order = rng.choice([2, 4, 8]), rng.choice(["little", "big"])
        value = rng.choice(FIELDS) & (256**width - 1)
        return (
            data[:place] + value.to_bytes(width, order) + data[place + width :],
            f"{width} bytes at {place} = {value:#x} {order}",
        )
    new = {
        "flip": bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 : place + length],
        "byte": bytes([rng.randrange(256)]) + data[place + 1 : place + length],
        "zero": bytes(length),
        "insert": bytes(rng.randrange(256) for _ in range(length)) + data[place : place + length],
        "drop": b"",
        "double": data[place : place + length] * 2,
    }[kind]
    return (
        data[:place] + new + data[place + length :],
        f"{kind} at {place}, {length} bytes of {size}",
    )


ODD_TEXT = [
    "\0",
    "\x1b[31m",
    "\x07",
    "\u202e",
    "\u200b",
    "\ufeff",
    "\ud83d",
    "\U0001f600",
    "\u0301",
    "\r",
    "\u2028",
    "\x85",
    "\ufffd",
    "ﬁ",
]


def mutate_text(rng: Random, text: str) -> tuple[str, str]:
    """One mutation of text: odd characters, lines dropped, doubled and swapped, long runs.

    Lone surrogates are among them.
    """
    place = rng.randrange(len(text) + 1)
    lines = text.split("\n")
    line = rng.randrange(len(lines))
    kind = rng.choice(
        [
            "odd",
            "odd",
            "odd",
            "cut",
            "drop",
            "double",
            "line",
            "twice",
            "swap",
            "long",
            "returns",
            "empty",
        ]
    )
    if kind == "odd":
        odd = rng.choice(ODD_TEXT)
        return text[:place] + odd + text[place:], f"{odd!r} at {place}"
    if kind == "cut":
        return text[:place], f"cut to {place} characters"
    if kind == "drop":
        return (
            text[:place] + text[place + rng.choice([1, 3, 20]) :],
            f"characters dropped at {place}",
        )
    if kind == "double":
        return text[:place] + text[max(place - 20, 0) :], f"characters doubled at {place}"
    if kind == "line":
        return "\n".join(lines[:line] + lines[line + 1 :]), f"line {line} dropped"
    if kind == "twice":
        return "\n".join(lines[: line + 1] + lines[line:]), f"line {line} twice"
    if kind == "swap":
        other = rng.randrange(len(lines))
        lines[line], lines[other] = lines[other], lines[line]
        return "\n".join(lines), f"lines {line} and {other} swapped"
    if kind == "long":
        return (
            text[:place] + rng.choice("ax {") * rng.choice([1000, 300_000]) + text[place:],
            f"a long run at {place}",
        )
    return (
        (text.replace("\n", "\r\n"), "carriage returns") if kind == "returns" else ("", "nothing")
    )


def encode(text: str) -> bytes:
    """UTF-8, lone surrogates as the three bytes that they would be."""
    return text.encode("utf-8", "surrogatepass")


FILE_KINDS = (
    "removed",
    "folder",
    "pipe",
    "link out",
    "link to nothing",
    "link in a circle",
    "link to a device",
)


def mutate_file(rng: Random, path: Path, outside: Path) -> str:
    """Something else than a file at `path`.

    `outside` is a folder beside the input, where links lead to; returns what was done.
    """
    kind = rng.choice(FILE_KINDS)
    outside.mkdir(exist_ok=True)
    target = outside / f"elsewhere-{path.name}"
    if path.is_dir():
        shutil.move(path, target)
    else:
        path.replace(target)
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "removed":
        path.symlink_to(
            {"link out": target, "link to nothing": target / "no", "link in a circle": path}.get(
                kind, "/dev/zero"
            )
        )
    return f"{path.name}: {kind}"
