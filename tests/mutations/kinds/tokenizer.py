"""tokenizer.json, tokenizer_config.json, vocab.json, merges.txt, added_tokens.json and the
end tokens of a folder.
"""

import json
from pathlib import Path
from random import Random

import tokenizers

from infinitevl_jax import Processor

from ..case import Case, Place
from ..content import encode, mutate_bytes, mutate_file, mutate_text
from ..values import Raw, dump, mutate, read
from . import processors
from .processors import TEXTS

KEYS = (
    "content",
    "special",
    "chat_template",
    "eos_token",
    "pad_token",
    "bos_token",
    "unk_token",
    "added_tokens_decoder",
    "model_max_length",
)
KEYS += (
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
    "type",
    "vocab",
    "merges",
    "truncation",
    "padding",
)
PARTS = {
    "normalizer": [
        "NFC",
        "Lowercase",
        "Replace",
        "Precompiled",
        "Prepend",
        "Strip",
        "Sequence",
        "BertNormalizer",
    ],
    "pre_tokenizer": [
        "ByteLevel",
        "Split",
        "Metaspace",
        "Whitespace",
        "Punctuation",
        "Sequence",
        "Digits",
    ],
    "decoder": [
        "ByteLevel",
        "Strip",
        "Replace",
        "Metaspace",
        "CTC",
        "Sequence",
        "BPEDecoder",
        "WordPiece",
    ],
    "post_processor": ["ByteLevel", "TemplateProcessing", "BertProcessing", "Sequence"],
    "model": ["BPE", "Unigram", "WordLevel", "WordPiece"],
}
OPTIONS = {
    "pattern": {"String": ""},
    "content": "",
    "precompiled_charsmap": "AAAA",
    "start": 2**40,
    "stop": -1,
    "vocab": [],
    "prepend": "x" * 1000,
}
OPTIONS |= {
    "normalizers": [],
    "decoders": [{"type": "Fuse"}],
    "behavior": "Isolated",
    "invert": False,
    "replacement": "▁▁",
    "unk_id": 9,
}


def make(rng: Random, place: Place) -> Case:
    writer = rng.choice([processors.one_file, processors.with_merges])
    folder = place.copy(f"tokenizer-{writer.__name__}", writer)
    names = (
        ["tokenizer.json"] * 5
        if writer is processors.one_file
        else ["vocab.json", "merges.txt", "added_tokens.json"] * 2
    )
    path = folder / rng.choice(
        [*names, "tokenizer_config.json", "tokenizer_config.json", "generation_config.json"]
    )
    return Case(
        f"{path.name}: {mutated(rng, path, place)}",
        lambda: use(Processor.from_pretrained(folder)),
        lambda found: _check(found, folder),
    )


def mutated(rng: Random, path: Path, place: Place) -> str:
    kind = rng.random()
    if kind < 0.08:
        return mutate_file(rng, path, place.work / "outside")
    if kind < 0.16:
        data, label = mutate_bytes(rng, path.read_bytes())
        path.write_bytes(data)
        return label
    if path.name == "merges.txt":
        text, label = mutate_text(rng, path.read_text())
        if rng.random() < 0.4:
            line = rng.choice(
                ["a b c", "a", "zz yy", " ", "h e", "\0 \0", "a  b", "<|im_end|> x", "h ell"]
            )
            text, label = path.read_text() + line + "\n", f"one line more: {line!r}"
        path.write_bytes(encode(text))
        return label
    content = json.loads(path.read_text())
    if path.name == "tokenizer.json" and kind < 0.4:
        part = rng.choice(list(PARTS))
        piece = {"type": rng.choice(PARTS[part])} | {
            k: OPTIONS[k] for k in rng.sample(list(OPTIONS), rng.randrange(4))
        }
        content[part] = rng.choice(
            [
                piece,
                {"type": "Sequence", f"{part}s": [piece, content[part]]},
                {**(content[part] or {}), **piece},
            ]
        )
        path.write_text(json.dumps(content))
        return f"{part} = {content[part]!r:.100}"
    if path.name == "vocab.json" and kind < 0.5:
        token = rng.choice(list(content))
        content[token] = value = rng.choice(
            [2**31, 2**32, -1, 1.5, "5", None, 5, 10**7, Raw("1e3"), True]
        )
        path.write_bytes(dump(content))
        return f"{token!r} = {value!r}"
    focus = [(key,) for key in content] if len(content) < 40 else None
    if path.name == "tokenizer.json":
        focus += [("model", key) for key in content["model"]] + [
            ("added_tokens", 0, key) for key in content["added_tokens"][0]
        ]
    if path.name == "tokenizer_config.json":
        some = rng.choice(list(content["added_tokens_decoder"]))
        focus += [("added_tokens_decoder", some), ("added_tokens_decoder", some, "content")] * 2
    changed = mutate(rng, content, focus=focus, keys=KEYS)
    path.write_bytes(changed.data)
    return changed.label


def use(processor: Processor) -> dict:
    """What people do with a tokenizer, on fixed words."""
    tokenizer = processor.tokenizer
    ids = [list(map(int, tokenizer.encode(text))) for text in TEXTS]
    stream = processor.stream()
    prompt = processor([{"role": "user", "content": "hello"}])
    return {
        "ids": ids,
        "texts": [tokenizer.decode(i, skip_special_tokens=False) for i in ids],
        "every": [tokenizer.decode([i]) for i in range(0, 300, 7)],
        "streamed": [stream.push(i) for i in ids[0]] + [stream.finish()],
        "prompt": prompt["input_ids"].tolist(),
        "ends": tokenizer.eos_ids,
        "pad": tokenizer.pad_id,
        "size": len(tokenizer),
        "tokens": {token: tokenizer.token_id(token) for token in processors.IDS},
    }


def _check(found: dict, folder: Path) -> str:
    """Ids as the files say.

    By the library itself for tokenizer.json, by merging here for vocab.json and merges.txt.
    """
    if any(not 0 <= i < 2**31 for i in (*found["ends"], found["pad"])):
        return f"ids out of range were accepted: {found['ends']}, {found['pad']}"
    if "".join(found["streamed"]) != found["texts"][0]:
        return f"streamed text differs: {found['streamed']!r:.80} for {found['texts'][0]!r:.80}"
    settings = read(folder / "tokenizer_config.json")
    listed = {
        e.get("content"): int(i) for i, e in (settings.get("added_tokens_decoder") or {}).items()
    }
    if (folder / "tokenizer.json").exists():
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
        if all(token in backend.get_vocab() for token in listed):
            ids = [backend.encode(text, add_special_tokens=False).ids for text in TEXTS]
            if ids != found["ids"]:
                return "other ids than the library's"
        return _held(found, listed)
    vocab = read(folder / "vocab.json")
    older = read(folder / "added_tokens.json")
    added = {t: i for t, i in older.items() if i not in listed.values()} | listed
    if any(
        isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 2**31
        for i in [*vocab.values(), *added.values()]
    ):
        return "ids that are no ids were accepted"
    if found["texts"][:2] != TEXTS[:2] and set("helo wrd") <= set(vocab) | {" "}:
        return f"text does not come back: {found['texts'][:2]!r:.120}"
    return _held(found, added)


def _held(found: dict, added: dict) -> str:
    wrong = [t for t, i in added.items() if t in found["tokens"] and found["tokens"][t] != i]
    return f"added tokens at other ids: {wrong[:3]}" if wrong else ""
