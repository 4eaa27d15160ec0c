"""Conversations that a language model writes by itself: data of stage II.

Examples:

    python -m benchmarks.training.sample SmolLM2 texts/sampled.jsonl --conversations 20000
    python -m benchmarks.training.sample SmolLM2 texts/sampled.jsonl --conversations 40000    # more of them

The model gets its chat template up to where a user speaks, writes the question, and then the answer
to it, both at temperature 1. Left out are questions or answers without an end or without words, and
questions that came before. A line holds the messages, as `train.data.kind = "openai"` reads them,
and the number of the conversation, which with the seed decides its tokens. The same command goes on
after the last line.
"""  # noqa: E501

import argparse
import json
import sys
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from infinitevl_jax import InfiniteVL, Processor, compilation
from infinitevl_jax.checkpoints.newest import checkpoint_folder
from infinitevl_jax.cli import logs
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.serve.engine import Engine
from infinitevl_jax.serve.requests import Request

STANDS_FOR = "QUESTION"  # of the user, where the template is cut


class Sampled(NamedTuple):
    """A conversation that is written, or, without messages, one that is left out."""

    number: int
    messages: list[dict[str, str]] | None


class Sampler:
    """Writes conversations, many at a time."""

    def __init__(
        self,
        model: InfiniteVL,
        processor: Processor,
        *,
        seed: int = 0,
        question_tokens: int = 256,
        answer_tokens: int = 768,
        slots: int = 128,
        temperature: float = 1.0,
    ):
        """
        Args:
          question_tokens, answer_tokens: at most. slots: conversations at a time.

        Raises:
          InfiniteVLError: the chat template does not show where a user speaks.
        """
        self.processor, self.seed, self.temperature = processor, seed, temperature
        self.question_tokens, self.answer_tokens = question_tokens, answer_tokens
        self.ends = [i for i in processor.tokenizer.eos_ids if i is not None]
        self.opening = opening(processor)
        longest = len(self.opening) + question_tokens + answer_tokens + 64
        self.engine = Engine(
            model, slots=slots, max_length=longest, chunk=min(256, longest), rows=min(8, slots)
        )
        self.slots, self.longest = slots, longest

    def conversations(self, first: int) -> Iterator[Sampled]:
        """Endless conversations in the order of their numbers, from `first` on."""
        under_way: deque[tuple[int, Request, str | None]] = deque()
        number = first
        while True:
            while len(under_way) < 3 * self.slots:  # the first to come may be the last to end
                under_way.append((number, self._ask(number), None))
                number += 1
            # those that have their question go on with the answer, wherever they stand
            for at, (which, request, question) in enumerate(under_way):
                if question is None and request.done:
                    question = self._text(request)
                    ids = question and self.processor([{"role": "user", "content": question}])
                    if not ids or len(ids["input_ids"][0]) + self.answer_tokens > self.longest:
                        question = ""
                    else:
                        request = self._submit(ids["input_ids"], which, 1, self.answer_tokens)
                    under_way[at] = (which, request, question)
            which, request, question = under_way[0]
            if question is not None and (not question or request.done):
                under_way.popleft()
                answer = question and self._text(request)
                said = (("user", question), ("assistant", answer))
                messages = [{"role": role, "content": text or ""} for role, text in said]
                yield Sampled(which, messages if answer else None)
                continue
            self.engine.step()

    def token_seed(self, number: int, turn: int) -> int:
        """Seed of the tokens of a conversation's question (turn 0) or answer (1)."""
        return zlib.crc32(f"{self.seed} {number} {turn}".encode()) >> 1

    def _ask(self, number: int) -> Request:
        return self._submit(self.opening[None], number, 0, self.question_tokens)

    def _submit(self, ids: np.ndarray, number: int, turn: int, most: int) -> Request:
        return self.engine.submit(
            ids,
            max_new_tokens=most,
            do_sample=True,
            temperature=self.temperature,
            top_k=0,
            top_p=1.0,
            seed=self.token_seed(number, turn),
            eos_token_ids=self.ends,
        )

    def _text(self, request: Request) -> str:
        """What was said; "" without an end, without words, or with control tokens in it."""
        *tokens, last = request.result()
        text = self.processor.decode(tokens, skip_special_tokens=False).strip()
        bare = self.processor.decode(tokens).strip()
        return text if last in self.ends and text == bare else ""


def opening(processor: Processor) -> np.ndarray:
    """Token ids [length] of the chat template up to where a user speaks.

    Raises:
      InfiniteVLError: the template does not show that place.
    """
    message = [{"role": "user", "content": STANDS_FOR}]
    ids = processor(message, add_generation_prompt=False)["input_ids"][0]
    text = processor.decode(ids, skip_special_tokens=False)
    if text.count(STANDS_FOR) != 1:
        raise InfiniteVLError(
            "the chat template does not show where a user speaks", "sample from another model"
        )
    cut = len(text[: text.index(STANDS_FOR)])
    for stop in range(len(ids) + 1):
        if len(processor.decode(ids[:stop], skip_special_tokens=False)) == cut:
            return ids[:stop]
    raise InfiniteVLError(
        "the user's words share a token with the chat template", "sample from another model"
    )


def sample(sampler: Sampler, out: Path, count: int) -> dict[str, int]:
    """Write conversations to a file until it has `count`.

    Returns:
      How many were written now, left out as unfinished, and left out as they came before.
    """
    lines = read(out)
    seen = {line["messages"][0]["content"] for line in lines}
    found = {"written": 0, "unfinished": 0, "repeated": 0}
    first = 1 + max((line["number"] for line in lines), default=-1)
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        out.open("a", encoding="utf-8") as file,
        tqdm(total=count, initial=len(lines), desc="conversations", dynamic_ncols=True) as bar,
    ):
        conversations = sampler.conversations(first)
        while len(lines) + found["written"] < count:
            number, messages = next(conversations)
            question = messages and messages[0]["content"]
            if messages is None:
                found["unfinished"] += 1
            elif question in seen:
                found["repeated"] += 1
            else:
                seen.add(question)
                line = {"number": number, "messages": messages}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                found["written"] += 1
                bar.update()
            bar.set_postfix({k: v for k, v in found.items() if k != "written"}, refresh=False)
    return found


def read(out: Path) -> list[dict]:
    """Lines of a file of conversations. One that a kill cut off is removed."""
    if not out.exists():
        return []
    text = out.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", type=Path, help="checkpoint folder of a chat model")
    parser.add_argument("out", type=Path, help="file of conversations, .jsonl")
    parser.add_argument("--conversations", type=int, required=True, help="that the file shall have")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=128, help="conversations at a time")
    parser.add_argument("--question-tokens", type=int, default=256, help="at most")
    parser.add_argument("--answer-tokens", type=int, default=768, help="at most")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    options = parser.parse_args()
    try:
        with logs.shown(sys.stdout), compilation.kept(True):
            folder = checkpoint_folder(options.teacher)
            sampler = Sampler(
                InfiniteVL.from_pretrained(folder, dtype=jnp.dtype(options.dtype)),
                Processor.from_pretrained(folder),
                seed=options.seed,
                question_tokens=options.question_tokens,
                answer_tokens=options.answer_tokens,
                slots=options.slots,
            )
            print(sample(sampler, options.out, options.conversations))
    except InfiniteVLError as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
