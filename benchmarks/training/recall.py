"""Recall at a distance: numbers planted in a text, and asked for later."""

from collections.abc import Sequence

import numpy as np

from benchmarks.training.corpora import marked
from infinitevl_jax import Processor
from infinitevl_jax.data.encoded import EncodedConversation

FIRST = ("Alice", "Martin", "Clara", "Peter", "Sofia", "Thomas", "Julia", "Daniel")
LAST = ("Miller", "Berger", "Rossi", "Novak", "Carter", "Jensen", "Silva", "Meyer")
BEFORE = 32  # tokens of text before the number is told


def needles(
    processor: Processor, texts: Sequence[np.ndarray], distance: int, count: int
) -> list[EncodedConversation]:
    """Texts that tell a number and end with it again. The number at the end bears loss.

    Args:
      texts: token ids to hide it in, each of more than distance + `BEFORE`; they come in turn.
      distance: tokens from the number's last token, where it is told, to its first at the end.
      count: of different names and numbers.
    """
    rng = np.random.default_rng(distance)
    found = []
    for number in range(count):
        name = f"{FIRST[rng.integers(len(FIRST))]} {LAST[rng.integers(len(LAST))]}"
        ask = _ids(processor, f"\nThe secret number of {name} is")
        answer = _ids(processor, f" {rng.integers(10_000, 100_000)}")
        end = _ids(processor, ".\n")
        room = distance - 1 - len(end) - len(ask)
        text = texts[number % len(texts)]
        parts = [text[:BEFORE], ask, answer, end, text[BEFORE : BEFORE + max(room, 0)], ask, answer]
        tokens = np.concatenate(parts)
        found.append(marked(tokens, len(tokens) - len(answer)))
    return found


def _ids(processor: Processor, text: str) -> np.ndarray:
    return processor.encode_document(text, closed=False)
