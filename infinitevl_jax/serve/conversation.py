"""A conversation on one cache: only what is new goes through the model, so each turn costs its own
length and memory stays constant."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.arrays import whole_number
from infinitevl_jax.inputs.model_inputs import build_inputs
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.processing import Processor
from infinitevl_jax.serve.infinitevl import InfiniteVL
from infinitevl_jax.serve.sampling import Sampling


@dataclass(frozen=True)
class Turn:
    """What the last answer took: tokens read and made, seconds to its first token and in all
    (compilation included)."""

    read: int
    made: int
    first: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second after the first (0 where there was only one)."""
        return (self.made - 1) / (self.seconds - self.first) if self.made > 1 else 0.0


@dataclass(frozen=True)
class _State:
    """A moment between two tokens."""

    messages: tuple[dict, ...]  # up to the last question
    prompt: str  # the same as text
    before: int  # the same in tokens
    said: list[int]  # the answer to it, whose last token need not be in the cache
    cache: Cache
    occurred: np.ndarray  # [vocab] bool: tokens up to the last question, for a repetition penalty


class Conversation:
    """Questions and answers that follow one another. Holds the cache, and the one before the last
    question for `undo`."""

    def __init__(
        self,
        model: InfiniteVL,
        processor: Processor,
        *,
        system: str | None = None,
        max_length: int | None = None,
    ):
        """
        Args:
          system: a system message in front of the first question.
          max_length: tokens to make room for where the model has full-attention layers; None makes
            room for one question and answer.
        """
        self.model, self.processor, self.max_length = model, processor, max_length
        self._opening = () if system is None else ({"role": "system", "content": system},)
        self.eos_token_ids = end_tokens(model, processor)
        self.turn: Turn | None = None
        self._state: _State | None = None
        self._undo: list[_State | None] = []
        self._speaks: object | None = None  # the answer that is being made

    @property
    def messages(self) -> tuple[dict, ...]:
        """What was said so far."""
        if self._state is None:
            return self._opening
        return (
            *self._state.messages,
            {"role": "assistant", "content": self.processor.decode(self._state.said)},
        )

    @property
    def tokens(self) -> int:
        """Tokens that the cache has taken in."""
        return int(self._state.cache.length[0]) if self._state else 0

    def reset(self) -> None:
        """Forget everything."""
        self._state, self._undo, self._speaks = None, [], None

    def undo(self) -> bool:
        """Back to before the last question, exactly. False where there is nothing to take back, or
        it has been already."""
        if not self._undo:
            return False
        self._state, self._speaks = self._undo.pop(), None
        return True

    def ask(
        self,
        content: str | list[dict],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """Say something (text, or a list of text, image and video items) and yield the answer's
        text as it is made.

        sampling: how to choose tokens; None is greedy, with the checkpoint's repetition penalty.

        Whoever stops listening (closes the generator) ends the answer there. So does a new
        question, `undo` or `reset`: from then on the generator is exhausted and changes nothing.
          Raises InfiniteVLError for what cannot be read or has no room; after any error
        the conversation stands where it stood.
        """
        max_new_tokens = whole_number(max_new_tokens, "max_new_tokens", 1)
        start, old, undo = time.perf_counter(), self._state, self._undo
        messages = (*self.messages, {"role": "user", "content": content})
        batch: dict[str, Any]
        batch, prompt = self.processor.continuation(messages, old.prompt if old else "")
        unread = old.said[self.tokens - old.before :] if old else []
        batch["input_ids"] = np.concatenate([np.array([unread], np.int32), batch["input_ids"]], 1)
        batch["attention_mask"] = np.ones_like(batch["input_ids"])
        before = self.tokens + batch["input_ids"].shape[1]
        max_new_tokens = self._room(before, max_new_tokens)
        past = (
            old.cache
            if old
            else self.model.init_cache(1, self.max_length or before + max_new_tokens)
        )
        inputs = build_inputs(
            self.model.config, **batch, start=np.asarray(past.next_position), generated=len(unread)
        )
        occurred = inputs.occurred(self.model.config.text.vocab_size)
        if old:
            occurred = occurred | old.occurred
            occurred[0, old.said] = True
        settings = {
            "max_new_tokens": max_new_tokens,
            "sampling": sampling,
            "seed": seed,
            "eos_token_ids": self.eos_token_ids,
        }
        logits, read = self.model.prefill(inputs, past)

        state = self._state = _State(messages, prompt, before, [], read, occurred[0])
        self._undo = [old]
        speaks = self._speaks = (
            object()
        )  # whose answer it is; undo may bring an older state back, never its speaker
        text, first = self.processor.stream(), None
        try:
            for made, (token, cache) in enumerate(
                self.model.decode(logits, read, occurred=occurred, **settings), 1
            ):
                now = time.perf_counter() - start
                first = first or now
                self.turn = Turn(batch["input_ids"].shape[1], made, first, now)
                state = self._state = replace(state, cache=cache)
                if int(token[0]) not in self.eos_token_ids:
                    state.said.append(int(token[0]))
                    yield text.push(int(token[0]))
                if (
                    self._speaks is not speaks
                ):  # meanwhile the conversation went on without this answer
                    return
            yield text.finish()
        except GeneratorExit:
            raise
        except BaseException:  # the device may have given up the cache half-way through a token
            if self._speaks is speaks:
                self._state, self._undo = old, undo
            raise

    def _room(self, length: int, wanted: int) -> int:
        """New tokens that there is room for after `length`."""
        if not self.model.keeps_everything or not self.max_length:
            return wanted
        if length >= self.max_length:
            raise InfiniteVLError(
                f"the conversation would have {length:,} tokens, its cache has room for"
                f" {self.max_length:,}",
                "start anew (reset), or make more room (max_length)",
            )
        return min(wanted, self.max_length - length)


def end_tokens(model: InfiniteVL, processor: Processor) -> tuple[int, ...]:
    """Ids that end an answer: what the checkpoint's configuration names, and the template's end of
    turn."""
    return tuple(dict.fromkeys((*model.config.eos_token_ids, *processor.tokenizer.eos_ids)))
