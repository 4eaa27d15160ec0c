"""Figures of a student beside its teacher, one JSON line each.

Every line has `stage` and `part`:

* text: of a corpus, at the training length: perplexity of both, `ratio`, `kl` per token, and
  `agreement`, the share of tokens for which both predict the same.
* long: of a corpus, at a multiple of the training length: perplexity of the last half length, with
  the whole history and (`near`) with that of the training length.
* greedy: of prompts from a corpus, or of questions (`chat`): the share of the teacher's greedy
  tokens that the student predicts after the same text (`agreement`); of the first tokens that both
  generate by themselves, the share that is the same (`free_agreement`), and how many are the same
  before the first that differs (`free_tokens`).
  What both answer to the questions is there too.
* recall: share of planted numbers that are predicted whole, at a distance in tokens.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from benchmarks.training.continuations import QUESTIONS, Continuation, continue_all
from benchmarks.training.corpora import Corpus, HeldOutText, marked, packed_batches, row_batches
from benchmarks.training.pair import Pair
from benchmarks.training.recall import needles
from infinitevl_jax.config.data import DataConfig
from infinitevl_jax.config.ranges import Positive, check_ranges
from infinitevl_jax.train.objectives.objective import STUDENT, TEACHER

SLACK = 128  # tokens of a long row beside the multiple: what recall takes for question and answer


@dataclass(frozen=True)
class FigureConfig:
    """What is measured. Overrides of the program name it: figures.rows=8.

    Attributes:
      length: the training length in tokens. batch: rows at a time. rows: of each corpus.
      multiples: of the length. long_rows: of each corpus and multiple.
      prompts: of each corpus, with `prompt_tokens` each. new_tokens: of a continuation.
      free_tokens: that are compared where both generate by themselves.
      window: of the student, the unit of `distances`. needles: numbers at each distance.
    """

    length: Positive = 2048
    batch: Positive = 8
    rows: Positive = 32
    multiples: tuple[Positive, ...] = (4, 16)
    long_rows: Positive = 4
    prompts: Positive = 8
    prompt_tokens: Positive = 128
    new_tokens: Positive = 128
    free_tokens: Positive = 64
    window: Positive = 512
    distances: tuple[Annotated[float, Meta(gt=0)], ...] = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
    needles: Positive = 16

    def __post_init__(self):
        for name in ("multiples", "distances"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_ranges(self)


class FigureLog:
    """OUT/figures.jsonl. A line that is there is not measured again."""

    def __init__(self, path: Path):
        self.path = path

    def lines(self) -> list[dict[str, Any]]:
        """All lines; one that a kill cut off is left out."""
        texts = self.path.read_text("utf-8").split("\n")[:-1] if self.path.exists() else []
        return [json.loads(text) for text in texts]

    def write(self, line: Mapping[str, Any]) -> None:
        """Add a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = "".join(json.dumps(old) + "\n" for old in [*self.lines(), _rounded(line)])
        aside = self.path.with_name(f".{self.path.name}.partial")
        aside.write_text(whole, "utf-8")
        aside.replace(self.path)

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether a line has these values."""
        return any(key.items() <= line.items() for line in self.lines())


def _rounded(line: Mapping[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}


Figure = tuple[dict[str, Any], Callable[[], dict[str, Any]]]  # what it is of, and its values


class Figures:
    """Measures checkpoints of a student."""

    def __init__(
        self,
        pair: Pair,
        corpora: Mapping[str, Corpus],
        sources: Mapping[str, Mapping[str, Any]],
        config: FigureConfig,
    ):
        """sources: of the first stage, which say what is held out."""
        self.pair, self.corpora, self.sources, self.config = pair, corpora, sources, config
        self.data = DataConfig(batch=config.batch, length=config.length)
        self._texts: dict[str, HeldOutText] = {}
        self._kept: dict[Any, Any] = {}  # what the teacher does is the same for all checkpoints

    def measure(self, stage: str, checkpoint: Path, log: FigureLog, ends: float) -> bool:
        """Add the lines of a stage that are missing.

        Args:
          ends: when to stop, by `time.monotonic`.

        Returns:
          Whether all are there.
        """
        opened = False
        for key, find in self._all():
            key = {"stage": stage, **key}
            if log.has(key):
                continue
            if time.monotonic() >= ends:
                return False
            if not opened:
                self.pair.open(checkpoint)
                opened = True
            began = time.monotonic()
            found = find()
            log.write(key | found | {"seconds": time.monotonic() - began})
        return True

    def _all(self) -> Iterator[Figure]:
        config = self.config
        documents = [c for c in self.corpora.values() if not c.conversations]
        for corpus in self.corpora.values():
            key = {"part": "text", "corpus": corpus.name, "unseen": corpus.unseen}
            yield key, lambda corpus=corpus: self._text(corpus)
        for corpus in [*documents, None]:
            name = corpus.name if corpus else "chat"
            key = {"part": "greedy", "corpus": name}
            yield key, lambda corpus=corpus: self._greedy(corpus)
        for distance in config.distances:
            tokens = round(distance * config.window)
            if tokens + SLACK <= max(self._lengths()):
                key = {"part": "recall", "distance": tokens, "windows": distance}
                yield key, lambda tokens=tokens: self._recall(tokens)
        for corpus in documents:
            for multiple in config.multiples:
                length = multiple * config.length
                if self._of(corpus).stretches(length + 1, 1):
                    key = {"part": "long", "corpus": corpus.name, "multiple": multiple}
                    yield key, lambda corpus=corpus, length=length: self._long(corpus, length)

    def _lengths(self) -> list[int]:
        """Row lengths for which there are programs."""
        config = self.config
        return [config.length, *(n * config.length + SLACK for n in sorted(config.multiples))]

    def _of(self, corpus: Corpus) -> HeldOutText:
        if corpus.name not in self._texts:
            source = None if corpus.unseen else self.sources[corpus.name]
            self._texts[corpus.name] = HeldOutText(
                corpus, source, self.pair.processor, self.pair.config, self.data
            )
        return self._texts[corpus.name]

    def _once(self, key: Any, find: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = find()
        return self._kept[key]

    def _text(self, corpus: Corpus) -> dict[str, Any]:
        text, rows = self._of(corpus), self.config.rows
        found = self.pair.compare(text.batches(rows))
        known = self._once(
            ("text", corpus.name), lambda: self.pair.alone(TEACHER, text.batches(rows))
        )
        own, theirs = float(np.exp(found["cross_entropy"])), float(np.exp(known["loss"]))
        return {
            "tokens": int(found["tokens"]),
            "perplexity": own,
            "teacher_perplexity": theirs,
            "ratio": own / theirs,
            "kl": found["kl"],
            "agreement": found["agreement"],
        }

    def _long(self, corpus: Corpus, length: int) -> dict[str, Any]:
        config = self.config
        last = config.length // 2
        rows = self._of(corpus).stretches(length + 1, config.long_rows)
        far = [marked(row, length + 1 - last) for row in rows]
        near = [marked(row[-config.length - 1 :], config.length + 1 - last) for row in rows]

        def perplexity(name: str) -> tuple[float, float]:
            whole = row_batches(far, self.pair.config, 1, length + SLACK)
            short = row_batches(near, self.pair.config, config.batch, config.length)
            return tuple(
                float(np.exp(self.pair.alone(name, batches)["loss"])) for batches in (whole, short)
            )

        own = perplexity(STUDENT)
        theirs = self._once(("long", corpus.name, length), lambda: perplexity(TEACHER))
        return {
            "tokens": last * len(rows),
            "perplexity": own[0],
            "perplexity_near": own[1],
            "ratio": own[0] / own[1],
            "teacher_perplexity": theirs[0],
            "teacher_perplexity_near": theirs[1],
        }

    def _recall(self, distance: int) -> dict[str, Any]:
        config, length = self.config, min(n for n in self._lengths() if n >= distance + SLACK)
        filler = [c for c in self.corpora.values() if not c.conversations]
        filler = ([c for c in filler if c.unseen] or filler)[0]
        texts = self._of(filler).stretches(distance + SLACK, config.needles)
        sequences = needles(self.pair.processor, texts, distance, config.needles)
        rows = config.batch if length == config.length else 1

        def right(name: str) -> float:
            # the measure is of a row, so each row has one number
            made = row_batches(sequences, self.pair.config, rows, length)
            return self.pair.alone(name, made)["exact"]

        exact = self._once(("recall", distance), lambda: right(TEACHER))
        return {"numbers": len(sequences), "exact": right(STUDENT), "teacher_exact": exact}

    def _continuations(self, name: str, corpus: Corpus | None) -> list[Continuation]:
        """What a model says after prompts from a corpus, or to the questions."""
        config = self.config
        if corpus is None:
            asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
            prompts = [self.pair.processor(messages)["input_ids"][0] for messages in asked]
        else:
            prompts = self._of(corpus).beginnings(config.prompt_tokens, config.prompts)
        return continue_all(self.pair.engine(name, config.length), prompts, config.new_tokens)

    def _greedy(self, corpus: Corpus | None) -> dict[str, Any]:
        config, where = self.config, corpus and corpus.name
        theirs = self._once(("greedy", where), lambda: self._continuations(TEACHER, corpus))
        own = self._continuations(STUDENT, corpus)
        forced = [marked(np.concatenate([c.prompt, c.tokens]), len(c.prompt)) for c in theirs]
        made = packed_batches(forced, self.pair.config, config.batch, config.length)
        agreement = self.pair.alone(STUDENT, made)
        free = [
            (a.tokens[: config.free_tokens], b.tokens[: config.free_tokens])
            for a, b in zip(theirs, own, strict=True)
        ]
        same = [_same(a, b) for a, b in free]
        line: dict[str, Any] = {
            "tokens": int(agreement["tokens"]),
            "agreement": agreement["accuracy"],
            "free_agreement": float(sum(s.sum() for s in same) / sum(len(s) for s in same)),
            "free_tokens": float(np.mean([np.cumprod(s).sum() for s in same])),
        }
        if corpus is None:
            say = self.pair.processor.decode
            line["answers"] = [
                {"question": question, "teacher": say(a.tokens), "student": say(b.tokens)}
                for question, a, b in zip(QUESTIONS, theirs, own, strict=True)
            ]
        return line


def _same(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """For each of the teacher's tokens, whether the student's in its place is the same."""
    padded = np.full(len(teacher), -1)
    padded[: len(student)] = student[: len(teacher)]
    return padded == teacher
