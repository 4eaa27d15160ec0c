"""Types and ranges of settings, checked by msgspec when a configuration is built."""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from infinitevl_jax.errors import InfiniteVLError

INT32 = 2**31 - 1
LAYERS = 1024  # more layers take hours to compile

Count = Annotated[int, Meta(ge=0, le=INT32)]
Positive = Annotated[int, Meta(ge=1, le=INT32)]
Seed = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Width = Annotated[int, Meta(ge=1, le=2**20)]  # channels, hidden units
Heads = Annotated[int, Meta(ge=1, le=4096)]
Share = Annotated[float, Meta(ge=0, le=1)]
Base = Annotated[float, Meta(gt=0, le=1e15)]  # of rotary frequencies
Folder = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^[^\0]*$")]
Name = Annotated[str, Meta(max_length=4096, pattern=r"^[^\0]*$")]  # may be empty


def check_ranges(config: Any) -> None:
    """Check every field of a configuration dataclass against its declared type and range.

    Raises:
      InfiniteVLError: names the field, its value and the allowed values.
    """
    for name, hint in hints(type(config)).items():
        if dataclasses.is_dataclass(plain(hint)):
            _check_kind(getattr(config, name), hint, name)
        elif (kind := table_of(hint)) is not None:
            _check_table(getattr(config, name), kind, name)
        else:
            check_value(getattr(config, name), hint, name.rstrip("_"))


def _check_kind(value: Any, hint: Any, key: str) -> None:
    """Check the type of a nested configuration, which has checked its own fields."""
    kind = plain(hint)
    optional = kind is not hint
    if not isinstance(value, kind) and not (optional and value is None):
        raise InfiniteVLError(
            f"{key} is {_shown(value)}",
            f"give a {kind.__name__}" + (" or None" if optional else ""),
        )


def _check_table(value: Any, kind: type, key: str) -> None:
    """Check a table of named configurations."""
    if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value):
        raise InfiniteVLError(
            f"{key} is {_shown(value)}", f"give a table of {kind.__name__} by name"
        )
    for name, item in value.items():
        _check_kind(item, kind, f"{key}.{name}")


def table_of(hint: Any) -> type | None:
    """The dataclass of a table of named configurations, dict[str, dataclass]; None for others."""
    kind = typing.get_args(hint)[1] if typing.get_origin(hint) is dict else None
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def check_value(value: Any, hint: Any, key: str) -> None:
    """Check that `value` has the type and range of `hint`.

    Raises:
      InfiniteVLError: names `key`, the value and the allowed values.
    """
    try:
        msgspec.convert(value, hint)
    except (msgspec.ValidationError, ValueError, RecursionError) as error:
        place = str(error).partition(" - at `$")[2].rstrip("`")  # "[3]": index of a list item
        if place[1:-1].isdigit():
            value = value[int(place[1:-1])]
            hint = _item(hint)
        raise InfiniteVLError(
            f"{key}{place} is {_shown(value)}", f"give {describe(hint)}"
        ) from None


def check_patterns(patterns: Iterable[str], key: str) -> None:
    """Raise InfiniteVLError, which names `key`, unless all are regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise InfiniteVLError(
                f"{key}: {pattern!r} is not a regular expression: {error}",
                "escape special characters, or fix it",
            ) from error


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """Declared types of a dataclass with their ranges."""
    return typing.get_type_hints(kind, include_extras=True)


def plain(hint: Any) -> Any:
    """A type without `| None` and without its range."""
    hint = _given(hint)
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def describe(hint: Any) -> str:
    """A declared type in words: "a whole number, 1 or more, at most 1024"."""
    if len(options := _options(hint)) > 1:
        return ", or ".join(describe(option) for option in options)
    kind = plain(hint)
    if typing.get_origin(kind) is dict:
        return f"a table whose values are each {describe(typing.get_args(kind)[1])}"
    if typing.get_origin(kind) is list:
        kind, words = list, f"a list, each {describe(_item(hint))}"
    elif typing.get_origin(kind) is tuple:
        kind, length = (
            tuple,
            len(typing.get_args(kind)) if Ellipsis not in typing.get_args(kind) else None,
        )
        words = "a list" + (f" of {length}" if length else "")
    elif typing.get_origin(kind) is typing.Literal:
        words = "one of " + ", ".join(typing.get_args(kind))
    else:
        words = _WORDS[kind]
    bounds = []
    for meta in getattr(_given(hint), "__metadata__", ()):
        unit = {str: " characters", tuple: " items"}.get(kind, "")
        bounds += [f"{low:,.15g} or more" for low in (meta.ge,) if low is not None]
        bounds += [f"more than {low:,.15g}" for low in (meta.gt,) if low is not None]
        bounds += [f"{low:,}{unit} or more" for low in (meta.min_length,) if low is not None]
        bounds += [
            f"at most {high:,.15g}{unit}" for high in (meta.le, meta.max_length) if high is not None
        ]
        bounds += ["without a NUL character" for pattern in (meta.pattern,) if pattern is not None]
    return ", ".join([words, *bounds])


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def _given(hint: Any) -> Any:
    """A type without `| None`, the first of several."""
    return _options(hint)[0]


def _options(hint: Any) -> list[Any]:
    """The types of a union, without None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return [hint]


def _item(hint: Any) -> Any:
    """The type of a list's items."""
    return typing.get_args(plain(hint))[0]


def _shown(value: Any) -> str:
    try:
        text = f"{value!r}"
    except (ValueError, RecursionError):  # an integer of over 4,300 digits, a deeply nested list
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-80:]}"
