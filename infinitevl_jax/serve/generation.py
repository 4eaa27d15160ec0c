"""What a call of `generate` asks for: our words and Hugging Face's, over what
generation_config.json says, checked in one place."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError, InfiniteVLWarning
from infinitevl_jax.inputs.arrays import INT32_MAX, as_numpy, integers, whole_number
from infinitevl_jax.serve.arguments import GENERATE, WITHOUT_EFFECT, refuse
from infinitevl_jax.serve.sampling import Sampling

NEW_TOKENS = 256  # of an answer, where neither the call nor the checkpoint says how many
WARPERS = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
}  # as transformers samples where nothing is said
LENGTHS = ("max_new_tokens", "max_length")

_ELSEWHERE = {"eos_token_id", "pad_token_id"}  # the configuration's


@dataclass(frozen=True)
class Defaults:
    """What a checkpoint's generation_config.json says of generation.

    Attributes:
      repetition_penalty: applied always.
      warpers: temperature, top_k, top_p, min_p as far as the file has them, for those who ask to
        sample.
      lengths: max_new_tokens and max_length as far as the file has them.
    """

    repetition_penalty: float = 1.0
    warpers: Mapping[str, float] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)

    @property
    def greedy(self) -> Sampling:
        """How a call that asks for nothing chooses."""
        return Sampling(repetition_penalty=self.repetition_penalty)


def read_defaults(folder: str | Path) -> Defaults:
    """The settings of a checkpoint folder's generation_config.json; an InfiniteVLWarning names
    those that are not applied.

    Raises InfiniteVLError for a file that is not JSON, or a value out of range.
    """
    from infinitevl_jax.reading import read_json

    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return Defaults()
    content = {name: value for name, value in read_json(path).items() if value is not None}
    warpers = {name: content[name] for name in WARPERS if name in content}
    lengths = {name: content[name] for name in LENGTHS if name in content}
    try:
        sampling = Sampling(**warpers, repetition_penalty=content.get("repetition_penalty", 1.0))
        for name, value in lengths.items():
            whole_number(value, name, 1)
    except InfiniteVLError as error:
        raise InfiniteVLError(f"{path}: {error.culprit}", error.cure) from None
    aside = []
    if content.get("do_sample") and sampling.temperature > 1e-3:
        named = ["do_sample=True", *(f"{name}={value!r}" for name, value in warpers.items())]
        aside.append(
            f"{', '.join(named)} (answers are greedy; pass do_sample=True, or a temperature, to"
            " sample)"
        )
    known = {"do_sample", "repetition_penalty", *WARPERS, *LENGTHS, *_ELSEWHERE, *WITHOUT_EFFECT}
    for name in sorted(content.keys() - known):
        neutral, cure = GENERATE.get(name, (None, "this package does not know it"))
        if content[name] != neutral:
            aside.append(f"{name}={content[name]!r} ({cure})")
    if aside:
        warnings.warn(f"{path}: not applied: {'; '.join(aside)}", InfiniteVLWarning, stacklevel=3)
    return Defaults(sampling.repetition_penalty, warpers, lengths)


@dataclass(frozen=True)
class Request:
    """One call's settings, resolved.

    Attributes:
      ends: ids that end a sequence. pad: what an ended sequence is filled up with.
      stop_strings: texts that end a sequence, as `tokenizer` decodes it.
      streamer: an object with put(ids) and end(), as transformers' TextStreamer.
    """

    max_new_tokens: int
    sampling: Sampling
    seed: int
    ends: tuple[int, ...]
    pad: int
    stop_strings: tuple[str, ...] = ()
    tokenizer: Any = None
    streamer: Any = None

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn."""
        return self.sampling.temperature > 0


def resolve(
    given: Mapping[str, Any], defaults: Defaults, config: ModelConfig, width: int
) -> Request:
    """The request that keyword arguments make, over a checkpoint's defaults.

    Args:
      given: max_new_tokens, max_length (prompt included), sampling (a Sampling, in place of all
        that follow), do_sample, temperature, top_k, top_p, min_p, repetition_penalty, seed,
        eos_token_ids or eos_token_id, pad_token_id, stop_strings with tokenizer, streamer. Hugging
        Face's other arguments are taken where they ask for what is done anyway.
      width: tokens of the prompt.

    Raises InfiniteVLError for an argument that is unknown, out of range, or would need what is not
    implemented; it names what to do.
    """
    given = {name: value for name, value in given.items() if value is not None}
    known = {
        "sampling",
        "do_sample",
        "repetition_penalty",
        "seed",
        "eos_token_ids",
        "stop_strings",
        "tokenizer",
        "streamer",
    }
    refuse(given, known | {*WARPERS, *LENGTHS, *_ELSEWHERE}, GENERATE, "generate")
    ends = config.eos_token_ids
    for name in ("eos_token_id", "eos_token_ids"):
        if name in given:
            ids = as_numpy(given[name], name).reshape(-1)
            ends = (
                ()
                if not ids.size
                else tuple(integers(ids, name, ("ids",), -INT32_MAX, INT32_MAX).tolist())
            )
    vocab = config.text.vocab_size
    return Request(
        max_new_tokens=_new_tokens(given, defaults, width),
        sampling=_sampling(given, defaults),
        seed=whole_number(given.get("seed", 0), "seed", 0, 2**32 - 1),
        ends=ends,
        pad=whole_number(
            given.get("pad_token_id", config.pad_token_id),
            "pad_token_id",
            0,
            max(vocab - 1, config.pad_token_id),
        ),
        stop_strings=_stop_strings(given),
        tokenizer=given.get("tokenizer"),
        streamer=_streamer(given.get("streamer")),
    )


def _new_tokens(given: Mapping[str, Any], defaults: Defaults, width: int) -> int:
    for lengths in (given, defaults.lengths):
        if "max_new_tokens" in lengths:
            return whole_number(lengths["max_new_tokens"], "max_new_tokens", 0)
        if "max_length" in lengths:
            longest = whole_number(lengths["max_length"], "max_length", 1)
            if longest <= width and lengths is given:
                raise InfiniteVLError(
                    f"max_length is {longest}, and the prompt alone has {width} tokens",
                    "max_length counts the prompt: make it larger, or say max_new_tokens",
                )
            return max(longest - width, 1)
    return NEW_TOKENS


def _sampling(given: Mapping[str, Any], defaults: Defaults) -> Sampling:
    asked = {name: given[name] for name in WARPERS if name in given}
    if "sampling" in given:
        if not isinstance(given["sampling"], Sampling):
            raise InfiniteVLError(
                f"sampling is {given['sampling']!r}",
                "pass Sampling(temperature=..., top_k=..., top_p=...)",
            )
        if also := [
            name for name in ("do_sample", "repetition_penalty", *WARPERS) if name in given
        ]:
            raise InfiniteVLError(
                f"sampling and {also[0]} came together",
                "say it once: either Sampling(...), or the arguments by name",
            )
        return given["sampling"]
    checked = Sampling(**asked)  # out of range is an error, in use or not
    do_sample = given.get(
        "do_sample", bool(asked) and not ("temperature" in asked and checked.temperature == 0)
    )
    if not isinstance(do_sample, bool):
        raise InfiniteVLError(f"do_sample is {do_sample!r}", "pass True or False")
    penalty = given.get("repetition_penalty", defaults.repetition_penalty)
    return Sampling(
        **({**WARPERS, **defaults.warpers, **asked} if do_sample else {}),
        repetition_penalty=penalty,
    )


def _stop_strings(given: Mapping[str, Any]) -> tuple[str, ...]:
    strings = given.get("stop_strings", ())
    strings = (strings,) if isinstance(strings, str) else strings
    if not isinstance(strings, list | tuple | set) or not all(
        isinstance(s, str) and s for s in strings
    ):
        raise InfiniteVLError(
            f"stop_strings is {given['stop_strings']!r}",
            "pass a text or a list of texts, none of them empty",
        )
    if strings:
        cure = "pass tokenizer=processor as well: ids have to be read as text"
        if "tokenizer" not in given:
            raise InfiniteVLError("stop_strings came without a tokenizer", cure)
        try:
            given["tokenizer"].decode([], skip_special_tokens=False)
        except (AttributeError, TypeError):
            raise InfiniteVLError(
                f"tokenizer is {given['tokenizer']!r}, which decodes no ids", cure
            ) from None
    return tuple(strings)


def _streamer(streamer: Any) -> Any:
    if streamer is not None and not (
        callable(getattr(streamer, "put", None)) and callable(getattr(streamer, "end", None))
    ):
        raise InfiniteVLError(
            f"streamer is {streamer!r}",
            "pass an object with put(ids) and end(), or follow model.stream(...)",
        )
    return streamer


class StopStrings:
    """Which sequences have come to one of some texts. Call it with each step's [batch] tokens."""

    def __init__(self, request: Request, batch: int):
        self._strings, self._tokenizer = request.stop_strings, request.tokenizer
        # A token is a byte at least, special ones apart: so many hold the longest text, and a
        # broken character before it.
        self._keep = max(len(text.encode("utf-8", "surrogatepass")) for text in self._strings) + 8
        self._tails: list[list[int]] = [[] for _ in range(batch)]

    def __call__(self, tokens) -> list[bool]:
        """[batch] bool: whose text has come to a stop string."""
        for tail, token in zip(self._tails, tokens, strict=True):
            tail.append(int(token))
            del tail[: -self._keep]
        texts = [self._tokenizer.decode(tail, skip_special_tokens=False) for tail in self._tails]
        return [any(text in said for text in self._strings) for said in texts]
