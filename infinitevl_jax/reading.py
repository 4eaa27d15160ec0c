"""Reading files from outside: size limits, and JSON with declared types and ranges."""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from infinitevl_jax.errors import InfiniteVLError

JSON_BYTES = 64 << 20  # largest JSON file; tokenizer.json files have up to 12 MB

_MEND = "fix that key, or copy the file again"

T = TypeVar("T")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file in binary mode. Pipes and devices, which may not end, are refused.

    Raises:
      InfiniteVLError: it is not a regular file.
      OSError, ValueError: as `open`.
    """
    # O_NONBLOCK: opening a named pipe must not wait for a writer
    file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise InfiniteVLError(f"{path} is not a regular file", "put the file itself there")
    return file


def open_file(path: Path) -> BinaryIO:
    """`open_regular` with all errors as InfiniteVLError."""
    try:
        return open_regular(path)
    except InfiniteVLError:
        raise
    except FileNotFoundError:
        raise InfiniteVLError(
            f"{path} does not exist", f"{path.parent} has to be a folder with a {path.name}"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InfiniteVLError(
            f"{path} cannot be read: {reason}", "check the path and its permissions"
        ) from None


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
      InfiniteVLError: the file is larger than `limit` or cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise InfiniteVLError(
                f"{path} has {size:,} bytes, more than the {limit:,} that are read",
                "check that it is the right file",
            )
        try:
            return file.read()
        except OSError as error:
            raise InfiniteVLError(
                f"{path} cannot be read: {error.strerror}", "copy the file again"
            ) from None


def read_json(path: Path, kind: type[T] = dict[str, Any], *, limit: int = JSON_BYTES) -> T:
    """Read a JSON file as a value of type `kind`.

    Args:
      path: the file.
      kind: a type that msgspec decodes: dict[str, Any], a msgspec.Struct with Annotated ranges, a
        union. Nothing is coerced: "1" and true are not numbers.
      limit: largest file in bytes.

    Raises:
      InfiniteVLError: the file cannot be read, is not JSON or has another type; names file and key.
    """
    return decode_json(read_bytes(path, limit), kind, str(path))


def decode_json(text: bytes | str, kind: type[T], where: str) -> T:
    """Decode JSON text as `read_json` does. `where` names it in errors."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        try:
            tree = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError):  # also damaged further on
            tree = None
        raise InfiniteVLError(f"{where}: {_at(error, tree)}", _MEND) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InfiniteVLError(
            f"{where} is not JSON: {error}", "download or write the file again"
        ) from None


def convert(tree: Any, kind: type[T], where: str) -> T:
    """Convert plain values (from JSON or TOML) to `kind`, with the checks of `read_json`."""
    try:
        return msgspec.convert(tree, kind, from_attributes=False)
    except msgspec.ValidationError as error:
        raise InfiniteVLError(f"{where}: {_at(error, tree)}", _MEND) from None
    except RecursionError:
        raise InfiniteVLError(f"{where} is nested too deeply", _MEND) from None
    except UnicodeError as error:
        raise InfiniteVLError(f"{where}: {error}", _MEND) from None


def plain_name(name: Any, where: str, suffix: str = "") -> str:
    """Return `name` if it is the name of a file directly inside a folder.

    Raises:
      InfiniteVLError: it has a separator, a leading dot, an unprintable character or a wrong
        suffix.
    """
    bad = not isinstance(name, str) or not name or name.startswith(".") or set(name) & set("/\\")
    if bad or not name.endswith(suffix) or not name.isprintable() or len(name.encode()) > 255:
        wanted = f"a plain file name{f' that ends in {suffix}' if suffix else ''}"
        raise InfiniteVLError(
            f"{where}: {name!r} is not {wanted}", "get the folder from a source that you trust"
        )
    return name


def inside(folder: Path, name: str) -> Path:
    """Return folder / name if it is inside the folder after links are resolved.

    Links from REPO/snapshots/REVISION to REPO/blobs (huggingface_hub's cache) count as inside.

    Raises:
      InfiniteVLError: it is outside, or cannot be resolved.
    """
    path = folder / name
    try:
        root, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a link loop, a NUL character
        raise InfiniteVLError(
            f"{path} cannot be read: {error}", "put the file itself there"
        ) from None
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(place) for place in roots):
        raise InfiniteVLError(
            f"{path} leads out of its folder, to {target}",
            "put the file itself there, or get the folder from a source that you trust",
        )
    return path


def check_regular(folder: Path) -> None:
    """Raise InfiniteVLError unless a folder holds only folders and regular files, at any depth.

    For folders that a library reads itself: it would wait for a pipe or read a device forever.
    """
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            try:
                regular = stat.S_ISREG(path.stat().st_mode)
            except OSError:  # a dangling or circular link
                regular = False
            if not regular:
                raise InfiniteVLError(f"{path} is not a regular file", "put the file itself there")


def unknown_keys(content: Mapping[str, Any], kind: type) -> list[str]:
    """Keys of an object that a msgspec.Struct does not declare, sorted."""
    return sorted(set(content) - set(kind.__struct_encode_fields__))


def _at(error: Exception, tree: Any) -> str:
    """msgspec's message after its path and the value found: "$.a[2]: 'x', expected ..."."""
    message, _, place = str(error).partition(" - at ")
    place = place.strip("`")
    try:
        for name, index in re.findall(r"\.(\w+)|\[(\d*|\.\.\.)\]", place):
            tree = tree[name or int(index)]
        found = f"{tree!r}: " if not isinstance(tree, dict | list) else ""
    except (KeyError, IndexError, TypeError, ValueError):  # "[...]" is any key of a dict
        found = ""
    return f"{place}: {found}{message}" if place else message
