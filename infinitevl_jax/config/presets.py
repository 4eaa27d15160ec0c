"""Presets: a training run as a TOML file, with `key=value` overrides. Unknown keys are errors."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeGuard

from msgspec import Meta

from infinitevl_jax.config.model import TextConfig, VisionConfig
from infinitevl_jax.config.ranges import (
    INT32,
    Name,
    check_ranges,
    check_value,
    hints,
    plain,
    table_of,
)
from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.config.shipped import find_preset, known_presets
from infinitevl_jax.config.student import MixersConfig, TeacherConfig
from infinitevl_jax.config.train import TrainConfig
from infinitevl_jax.config.variants import variants
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import read_bytes

PRESET_BYTES = 1 << 20
DOTS = 200  # largest number of dots in a line
Pixels = Annotated[int, Meta(ge=1, le=INT32)]

# keys of earlier versions -> current keys
RENAMED = {
    "run.attend": "run.ops.attention",
    "run.gated_delta_rule": "run.ops.gated_delta_rule",
    "run.causal_conv": "run.ops.short_conv",
    "train.data.opening": "train.data.options.opening",
    "train.data.opening_steps": "train.data.options.opening_steps",
    "train.data.balance": "train.data.options.balance",
}


@dataclass(frozen=True)
class ModelSource:
    """Source of the model: a checkpoint folder, or sizes and new weights.

    Attributes:
      from_: "from" in the file; a checkpoint folder of this project or of Hugging Face, or a run's
        folder, for its newest checkpoint. It decides sizes and tokenizer.
      tokenizer: with sizes: a folder with tokenizer and processor files; "words" for one token per
        word of the training questions; or "bytes" for bytes and the words that many rows share.
      min_pixels, max_pixels: limits that images are resized to; None takes the folder's (with
        "words" and "bytes": 3136, 1003520).
      mixers: mixers that replace those of the folder's model.
      family: with sizes: of the model's files, a registered one; None is this project's.
      initializer_range: with sizes: standard deviation of new embeddings.
      text, vision: sizes. With "words", vocab_size is that of the tokenizer, with "bytes" at most
        as given.
    """

    from_: Name = ""
    tokenizer: Name = "words"
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    mixers: MixersConfig | None = None
    family: Name | None = None
    initializer_range: Annotated[float, Meta(ge=0, le=1e6)] = 0.02
    text: TextConfig | None = None
    vision: VisionConfig | None = None

    def __post_init__(self):
        check_ranges(self)
        if bool(self.from_) == (self.text is not None):
            raise InfiniteVLError(
                f"the preset gives {'both' if self.from_ else 'neither'} model.from"
                f" {'and' if self.from_ else 'nor'} model.text",
                "name a checkpoint folder in model.from, or give the sizes in [model.text] and"
                " [model.vision]",
            )
        fresh = {
            name: getattr(self, name)
            for name in ("vision", "tokenizer", "initializer_range", "family")
        }
        given = [name for name, value in fresh.items() if value != getattr(type(self), name)]
        if self.from_ and given:
            raise InfiniteVLError(
                f"the preset gives model.from and model.{given[0]}",
                f"the folder decides that: remove model.{given[0]}, or model.from",
            )

        if self.mixers is not None and not self.from_:
            raise InfiniteVLError(
                "the preset gives model.mixers without model.from",
                "name the checkpoint folder whose mixers they replace, or put the mixers into"
                " [model.text]",
            )


@dataclass(frozen=True)
class Preset:
    """A training run: model, teacher (where the objective has one), run and training
    configuration."""

    model: ModelSource
    teacher: TeacherConfig | None = None
    run: RunConfig = field(default_factory=RunConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def load_preset(path: str | Path, overrides: Sequence[str] = ()) -> Preset:
    """Read a preset and apply overrides such as "train.optimizer.peak_lr=1e-4".

    path: a TOML file, or the name of a shipped preset, such as "easy_vqa".

    Raises:
      InfiniteVLError: the file is not TOML, a key is unknown, or a value has the wrong type.
    """
    path = find_preset(path)
    try:
        tree = _toml(read_bytes(path, PRESET_BYTES).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if not isinstance(error, InfiniteVLError):
            reason = "it nests too deep" if isinstance(error, RecursionError) else error
            raise InfiniteVLError(
                f"preset {path} cannot be read: {reason}", "fix the TOML"
            ) from None
        known = ", ".join(known_presets()) or "none"
        raise InfiniteVLError(
            error.culprit, f"name a preset (here: {known}), or fix the file"
        ) from None
    for change in overrides:
        override(tree, change)
    return parse(Preset, tree, "", str(path))


def parse(kind: type, tree: Any, key: str, where: str) -> Any:
    """Build a configuration dataclass from a TOML table.

    Args:
      key: dotted name of the table.
      where: name of the file, for errors.
    """
    if not isinstance(tree, dict):
        raise InfiniteVLError(
            f"{where}: {key} is {tree!r}", f"{key} is a table: write [{key}], then its keys"
        )
    kind = _variant(kind, tree, key, where)
    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(kind)}
    declared = hints(kind)
    for name in tree:
        if name not in fields:
            full = _join(key, name)
            if full in RENAMED:
                raise InfiniteVLError(f"{where}: {full} has a new name", f"write {RENAMED[full]}")
            near = difflib.get_close_matches(name, fields, n=3, cutoff=0.5) or [
                n for n in _everywhere() if n.rsplit(".", 1)[-1] == name
            ]
            near = [n if "." in n else _join(key, n) for n in near]
            raise InfiniteVLError(
                f"{where}: unknown key {full!r}",
                f"did you mean {' or '.join(near)}?" if near else f"keys here: {', '.join(fields)}",
            )
    required = [
        n
        for n, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [n for n in required if n not in tree]:
        raise InfiniteVLError(
            f"{where}: {_join(key, missing[0])} is missing", "add it to the preset"
        )
    values = {
        fields[name].name: _value(declared[fields[name].name], value, _join(key, name), where)
        for name, value in tree.items()
    }
    try:
        return kind(**values)
    except InfiniteVLError as error:
        raise InfiniteVLError(f"{where}: {error.culprit}", error.cure) from None


def _variant(kind: type, tree: dict, key: str, where: str) -> type:
    """The kind that a table's `name` chooses, where its kind has variants."""
    if not (known := variants(kind)):
        return kind
    name = tree.get("name", next(f.default for f in dataclasses.fields(kind) if f.name == "name"))
    try:
        check_value(name, typing.Literal[tuple(sorted(known))], f"{key}.name")
    except InfiniteVLError as error:
        raise InfiniteVLError(f"{where}: {error.culprit}", error.cure) from None
    return known[name]


def to_tree(config: Any) -> Any:
    """A configuration as plain dicts, lists and scalars for JSON, without None values."""
    if dataclasses.is_dataclass(config):
        pairs = ((f.name.rstrip("_"), getattr(config, f.name)) for f in dataclasses.fields(config))
        return {name: to_tree(value) for name, value in pairs if value is not None}
    if isinstance(config, dict):
        return {name: to_tree(value) for name, value in config.items()}
    return list(config) if isinstance(config, tuple) else config


def differences(old: dict, new: dict, key: str = "") -> list[str]:
    """Keys whose values differ between two trees, one line each with both values."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b, full = old.get(name), new.get(name), _join(key, name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, full)
        elif a != b:
            found.append(f"{full}: {a!r} there, {b!r} now")
    return found


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _everywhere(kind: type = Preset, key: str = "") -> list[str]:
    """Dotted names of all keys."""
    names = []
    for f in dataclasses.fields(kind):
        inner = plain(hints(kind)[f.name])
        full = _join(key, f.name.rstrip("_"))
        if named := table_of(hints(kind)[f.name]):
            names += _everywhere(named, f"{full}.NAME")
        else:
            names += _everywhere(inner, full) if _is_table(inner) else [full]
    return names


def _is_table(kind: Any) -> TypeGuard[type]:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _value(hint: Any, value: Any, key: str, where: str) -> Any:
    """Convert a TOML value to the type of its field; accepts integers for floats."""
    kind = plain(hint)
    if _is_table(kind):
        return parse(kind, value, key, where)
    if (named := table_of(hint)) is not None:
        if not isinstance(value, dict):
            raise InfiniteVLError(
                f"{where}: {key} is {value!r}",
                f"{key} is a table: write [{key}.NAME], then its keys",
            )
        return {name: parse(named, item, _join(key, name), where) for name, item in value.items()}
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        value = tuple(value)
    try:
        check_value(value, hint, key)
    except InfiniteVLError as error:
        raise InfiniteVLError(f"{where}: {error.culprit}", error.cure) from None
    return float(value) if kind is float and value is not None else value


def _toml(text: str) -> dict[str, Any]:
    """`tomllib.loads` with a limit on dots, as its cost is quadratic in the parts of a key."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > DOTS:
            raise ValueError(f"line {number} has more than {DOTS} dots")
    return tomllib.loads(text)


def override(tree: dict, change: str) -> None:
    """Apply one `dotted.key=value` override. A value that is not TOML (a word, a path) is text."""
    key, equals, text = change.partition("=")
    if not equals or not all(key.split(".")):
        raise InfiniteVLError(
            f"{change!r} is not an override of the preset",
            "write dotted.key=value, such as train.optimizer.peak_lr=1e-4",
        )
    try:
        value = _toml(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else error
        raise InfiniteVLError(
            f"{key}: its value cannot be read: {reason}", "give a number, a string or a short list"
        ) from None
    *path, last = key.split(".")
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise InfiniteVLError(
                f"{change!r}: {name} is a value, not a table", "check the dotted name"
            )
    tree[last] = value
