"""What a mixture contains: counts, lengths, how well rows are filled, and samples."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.data.encode import Encoder
from infinitevl_jax.data.encoded import Branch
from infinitevl_jax.data.measure import measure
from infinitevl_jax.data.mixture import Mixture, Order
from infinitevl_jax.data.pipeline import packed_rows
from infinitevl_jax.errors import BadRow
from infinitevl_jax.processing import Processor

QUANTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass
class Counts:
    """Figures of a source, or of all.

    Attributes:
      rows: of the split. weight: passes in an epoch.
      tokens: of each usable row. loss: those that bear loss. patches: of each usable row.
      skipped: what is wrong with the other rows, by their number.
    """

    rows: int
    weight: float = 1.0
    tokens: list[int] = field(default_factory=list)
    loss: list[int] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        return len(self.tokens)

    def lengths(self) -> list[int]:
        """`QUANTILES` of the tokens."""
        found = np.percentile(self.tokens or [0], QUANTILES, method="nearest")
        return [int(value) for value in found]


@dataclass
class Summary:
    """Figures of a mixture.

    Attributes:
      sources: by name.
      steps: of an epoch. filled: share of the rows' tokens that are used in it.
    """

    sources: dict[str, Counts]
    steps: int
    filled: float

    @property
    def all(self) -> Counts:
        """All sources as one."""
        parts = list(self.sources.values())
        total = Counts(sum(part.rows for part in parts))
        for name in ("tokens", "loss", "patches"):
            setattr(total, name, [value for part in parts for value in getattr(part, name)])
        reasons = [reason for part in parts for reason in part.skipped.values()]
        total.skipped = dict(enumerate(reasons))
        return total


def summarise(
    encoder: Encoder,
    data: DataConfig,
    seed: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Summary:
    """Encode every row once and count. Conversations are counted whole, also where a run would draw
    questions from them."""
    mixture: Mixture = encoder.dataset
    counts = {name: Counts(rows, mixture.weights[name]) for name, rows in mixture.sizes.items()}

    rows = encoder if data.questions else encoder.within(data)
    sizes = measure(rows, data.workers, progress)
    for number, found in enumerate(sizes):
        part = counts[mixture.find(number)[0]]
        if isinstance(found, BadRow):
            part.skipped[found.index] = found.reason
            continue
        part.tokens.append(sum(piece.tokens for piece in found))
        part.loss.append(sum(piece.loss for piece in found))
        part.patches.append(sum(piece.patches for piece in found))
    order = Order(mixture, seed)
    if data.questions:
        return Summary(counts, max(1, round(order.epoch / data.batch)), float("nan"))
    lanes = packed_rows(order, data, order.epoch, sizes)
    steps = max(rows for rows, _ in lanes)
    room = steps * data.batch * data.length
    return Summary(counts, steps, sum(tokens for _, tokens in lanes) / max(room, 1))


def render(branch: Branch, processor: Processor, mark: Callable[[str], str]) -> str:
    """A sequence as text, with `mark` on what bears loss. Vision tokens in a row are counted."""
    edges = np.flatnonzero(np.diff(branch.answer.astype(np.int8))) + 1
    text = ""
    for tokens, learnt in zip(
        np.split(branch.tokens, edges), np.split(branch.answer, edges), strict=True
    ):
        part = "".join(_words(tokens, processor))
        text += mark(part) if learnt[0] else part
    return text


def _words(tokens: np.ndarray, processor: Processor) -> Iterator[str]:
    """Texts of tokens, one for each run of a vision token."""
    known = (processor.tokenizer.token_id(f"<|{noun}_pad|>") for noun in ("image", "video"))
    pads = [token for token in known if token is not None]
    edges = np.flatnonzero(np.diff(np.where(np.isin(tokens, pads), tokens, -1))) + 1
    for run in np.split(tokens, edges):
        many = len(run) > 1 and run[0] in pads
        word = processor.decode(run[:1] if many else run, skip_special_tokens=False)
        yield f"{word} x {len(run)} " if many else _printable(word)


def _printable(text: str) -> str:
    """Text without characters that a terminal obeys."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
