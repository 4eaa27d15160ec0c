"""Greedy continuations of prompts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from infinitevl_jax.serve.engine import Engine

QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in a few sentences why the sky is blue.",
    "Write a short poem about the sea in winter.",
    "How do I boil an egg so that the yolk stays soft?",
    "What is the difference between a list and a tuple in Python?",
    "Give me three ideas for a birthday present for my grandmother.",
    "Who wrote Romeo and Juliet, and when?",
    "Summarise in one sentence what photosynthesis does.",
    "Translate into French: Good morning, how are you?",
    "What should I pack for a week of hiking in the mountains?",
    "A train goes 60 km in 40 minutes. How far does it go in two hours?",
    "Why do cats purr?",
)


class Continuation(NamedTuple):
    """A prompt and what was said after it, its end included, both token ids [length]."""

    prompt: np.ndarray
    tokens: np.ndarray


def continue_all(
    engine: Engine, prompts: Sequence[np.ndarray], new_tokens: int
) -> list[Continuation]:
    """What a model says greedily after prompts, each token ids [length].

    new_tokens: at most, of each.
    """
    requests = [
        engine.submit(prompt[None], max_new_tokens=new_tokens, do_sample=False)
        for prompt in prompts
    ]
    engine.run()
    return [
        Continuation(prompt, request.result())
        for prompt, request in zip(prompts, requests, strict=True)
    ]
