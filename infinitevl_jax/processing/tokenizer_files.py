"""Tokenizer files of a checkpoint folder, checked before the `tokenizers` library reads them.

On unusual values that library, which is native code, raises bare exceptions, panics, crashes the
process or does not return.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tokenizers
from msgspec import Meta, Struct, field

from infinitevl_jax import reading
from infinitevl_jax.errors import InfiniteVLError

SIZE = 524_288  # tokens of a vocabulary; twice the largest released one
ADDED = 65_536  # added tokens; each takes 15 microseconds to load
GROWTH = 64  # factor by which normalisation may lengthen a text
MERGES_BYTES = 32 << 20

Id = Annotated[int, Meta(ge=0, lt=1 << 24)]
Spelling = Annotated[str, Meta(min_length=1, max_length=4096)]
NORMALIZERS = (
    *(
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Lowercase",
        "Strip",
        "StripAccents",
        "Replace",
        "Prepend",
        "ByteLevel",
    ),
    *("BertNormalizer", "Sequence"),
)


class Token(Struct):
    """An added token in tokenizer_config.json or special_tokens_map.json."""

    content: Spelling
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = False


class NumberedToken(Token, kw_only=True):
    """An added token in tokenizer.json."""

    id: Id


class Component(Struct):
    """A normalizer, pre-tokenizer or decoder of tokenizer.json."""

    type: Annotated[str, Meta(max_length=64)]
    normalizers: Annotated[list["Component"], Meta(max_length=32)] = []
    pretokenizers: Annotated[list["Component"], Meta(max_length=32)] = []
    decoders: Annotated[list["Component"], Meta(max_length=32)] = []
    pattern: dict[Literal["String", "Regex"], Spelling] | Spelling | None = None
    content: Annotated[str, Meta(max_length=4096)] | None = None
    prepend: Annotated[str, Meta(max_length=64)] = ""
    # of a Strip decoder; larger values panic on short tokens
    start: Annotated[int, Meta(ge=0, le=1)] = 0
    stop: Annotated[int, Meta(ge=0, le=0)] = 0
    length: Annotated[int, Meta(ge=1)] = 1

    @property
    def parts(self) -> list["Component"]:
        """This component and all nested ones."""
        inner = [*self.normalizers, *self.pretokenizers, *self.decoders]
        return [self, *[part for step in inner for part in step.parts]]

    @property
    def growth(self) -> float:
        """Factor by which this component alone may lengthen a text."""
        if self.content is None or not isinstance(self.pattern, dict):
            return 1
        # An expression that matches the empty string inserts its content before every character.
        return max(
            1,
            *[
                len(self.content) / len(p) if kind == "String" else 1 + len(self.content)
                for kind, p in self.pattern.items()
            ],
        )


class Model(Struct):
    vocab: (
        Annotated[dict[str, Id], Meta(max_length=SIZE)]
        | Annotated[list[tuple[str, float]], Meta(max_length=SIZE)]
    )
    type: Literal["BPE", "WordLevel", "WordPiece", "Unigram"] | None = None
    merges: Annotated[list[str | tuple[str, str]], Meta(max_length=2 * SIZE)] = []
    # dropout would make tokenization random
    dropout: Annotated[float, Meta(ge=0, le=0)] | None = None
    max_input_chars_per_word: Annotated[int, Meta(ge=0, le=10_000)] = 100


class TokenizerFile(Struct):
    """tokenizer.json."""

    model: Model
    added_tokens: Annotated[list[NumberedToken], Meta(max_length=ADDED)] = []
    normalizer: Component | None = None
    pre_tokenizer: Component | None = None
    decoder: Component | None = None


class NamedTemplate(Struct):
    name: str
    template: str


class Settings(Struct):
    """tokenizer_config.json: special tokens, added tokens, chat template."""

    bos_token: str | Token | None = None
    eos_token: str | Token | None = None
    pad_token: str | Token | None = None
    unk_token: str | Token | None = None
    added_tokens_decoder: Annotated[dict[str, Token], Meta(max_length=ADDED)] | None = None
    chat_template: str | list[NamedTemplate] | None = None


class Ends(Struct):
    """End tokens of generation_config.json and config.json, and config.json's vocabulary size."""

    eos_token_id: Id | list[Id] | None = None
    vocab_size: Annotated[int, Meta(ge=1)] | None = None
    text_config: "Ends | None" = None


class RoleMap(Struct):
    """special_tokens_map.json."""

    bos_token: str | Token | None = None
    eos_token: str | Token | None = None
    pad_token: str | Token | None = None
    unk_token: str | Token | None = None
    additional_special_tokens: list[str | Token] = field(default_factory=list)


def read_optional(path: Path, kind: type) -> Any:
    """Read a JSON file as `kind`; `kind()` if the file does not exist."""
    return reading.read_json(path, kind) if path.exists() else kind()


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """Load tokenizer.json. Raises InfiniteVLError if it is invalid or may not terminate."""
    content = reading.read_bytes(path, reading.JSON_BYTES)
    try:
        file = reading.decode_json(content, TokenizerFile, path.name)
    except InfiniteVLError as error:
        raise InfiniteVLError(f"{path} is not a tokenizer: {error.culprit}", error.cure) from error
    _check_steps(file, path)
    with native(f"{path} is not a tokenizer", "copy it again from the source checkpoint"):
        backend = tokenizers.Tokenizer.from_buffer(content)
        backend.no_truncation()
        backend.no_padding()
        # a trial run, so that an invalid tokenizer fails here
        ids = backend.encode("It's 1 test, caf\u00e9 \U0001f98a\n\n", add_special_tokens=False).ids
        backend.decode(ids)
        backend.decode(list(range(min(8, backend.get_vocab_size()))))
    return backend


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Pairs of merges.txt."""
    try:
        lines = reading.read_bytes(path, MERGES_BYTES).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InfiniteVLError(
            f"{path} is not UTF-8: {error}", "copy it again from the source checkpoint"
        ) from None
    if len(lines) > 2 * SIZE:
        raise InfiniteVLError(
            f"{path} has {len(lines):,} lines, more than {2 * SIZE:,}",
            "check that it is the right file",
        )
    pairs = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r")
        if line and not line.startswith("#version"):
            pair = tuple(line.split(" "))
            if len(pair) != 2:
                raise InfiniteVLError(
                    f"{path}, line {number} is not a pair: {line[:80]!r}",
                    "copy it again from the source checkpoint",
                )
            pairs.append(pair)
    return pairs


def read_vocabulary(path: Path) -> dict[str, int]:
    """Ids by token from vocab.json or added_tokens.json."""
    return reading.read_json(path, Annotated[dict[str, Id], Meta(max_length=SIZE)])


@contextlib.contextmanager
def native(culprit: str, cure: str) -> Iterator[None]:
    """Context manager that turns all errors of `tokenizers`, panics too, into InfiniteVLError."""
    try:
        yield
    except InfiniteVLError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise InfiniteVLError(f"{culprit}: {_short(error)}", cure) from error
    except BaseException as error:  # a panic is not an Exception; its class cannot be imported
        if type(error).__name__ != "PanicException":
            raise
        raise InfiniteVLError(f"{culprit}: {_short(error)}", cure) from error


def _check_steps(file: TokenizerFile, path: Path) -> None:
    """Raise InfiniteVLError for components that lengthen text too much or may not terminate."""
    cure = (
        "get the tokenizer from the source checkpoint; no published model of this family has such a"
        " step"
    )
    for name, step in (
        ("normalizer", file.normalizer),
        ("pre_tokenizer", file.pre_tokenizer),
        ("decoder", file.decoder),
    ):
        growth = 1.0
        for part in step.parts if step else []:
            if name == "normalizer" and part.type not in NORMALIZERS:
                raise InfiniteVLError(
                    f"{path}: the normalizer {part.type!r} is not supported",
                    f"use {', '.join(NORMALIZERS)}",
                )
            growth *= part.growth
            patterns = part.pattern if isinstance(part.pattern, dict) else {}
            if nested := NESTED.search(CLASS.sub("x", patterns.get("Regex", ""))):
                raise InfiniteVLError(
                    f"{path}: {name} has an expression that repeats a repetition,"
                    f" {nested.group()!r}, and may never end",
                    cure,
                )
        if growth > GROWTH:
            raise InfiniteVLError(
                f"{path}: {name} makes a text up to {growth:,.0f} times as long, more than"
                f" {GROWTH}",
                cure,
            )


# escapes and character classes
CLASS = re.compile(r"\\[pP]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)
NESTED = re.compile(r"\([^()]*[+*}][^()]*\)(?:[+*]|\{\d*,)")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
