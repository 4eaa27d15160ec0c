"""Tables and plots of what is recorded: one page and some pictures for each device and model."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.inference.figures import FIGURES

Column = tuple[str, Callable[[dict], object]]


def report(results: Path, folder: Path) -> list[Path]:
    """Write tables and plots of all lines of `results` to `folder`. Returns the files.

    Raises SystemExit if nothing was recorded.
    """
    texts = results.read_text("utf-8").splitlines() if results.exists() else []
    if not texts:
        raise SystemExit(f"{results} holds no lines\n  -> run some parts first (--help)")
    groups: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for text in texts:
        line = json.loads(text)
        groups[line["device"], line["model"]].append(line)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for (device, model), lines in groups.items():
        stem = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device} {model}").strip("-")
        page = [f"# Inference: {model}, {device}", ""]
        for title, rows, columns in tables(lines):
            page += [f"## {title}", "", *table(rows, columns), ""]
        # the operators that the model chooses by itself, where they were measured
        drawn = [line for line in lines if not line.get("allowed")] or lines
        for name, draw in FIGURES.items():
            figure = draw(drawn)
            if figure is not None:
                path = folder / f"{stem}-{name}.png"
                _replace(path, lambda aside, figure=figure: figure.savefig(aside, format="png"))
                page += [f"![{name}]({path.name})", ""]
                written.append(path)
        path = folder / f"{stem}.md"
        _replace(path, lambda aside, page=page: aside.write_text("\n".join(page), "utf-8"))
        written.append(path)
    return written


def tables(lines: Sequence[dict]) -> list[tuple[str, list[dict], list[Column]]]:
    """Title, lines and columns of each table that has lines."""
    by_part = defaultdict(list)
    for line in lines:
        by_part[line["part"]].append(line)
    batches = by_part["batch"]
    found = [
        ("The card", by_part["card"], CARD),
        ("Decoding, ms a token", ordered(by_part["decode"], "batch", "context"), DECODE),
        (
            "Decoding by a Transformer of equal size",
            ordered(beside_ours(by_part["transformer"], by_part["decode"]), "form", "context"),
            PEER,
        ),
        ("Prefill", ordered(by_part["prefill"], "prompt"), PREFILL),
        ("One stream", ordered(by_part["stream"], "frames"), STREAM),
        ("Many streams", ordered(by_part["streams"], "streams", "rows"), STREAMS),
        ("Requests", [line for line in batches if "prompt" not in line], REQUESTS),
        ("While a long prompt is read", [line for line in batches if "prompt" in line], LONG),
    ]
    return [(title, rows, columns) for title, rows, columns in found if rows]


def beside_ours(peers: Sequence[dict], ours: Sequence[dict]) -> list[dict]:
    """The Transformer's lines with our time of a token, at the context nearest to theirs."""
    single = [line for line in ours if line["batch"] == 1]

    def nearest(context: int) -> dict | None:
        distance = {i: abs(math.log(line["context"] / context)) for i, line in enumerate(single)}
        return single[min(distance, key=distance.__getitem__)] if distance else None

    found = []
    for line in peers:
        own = nearest(line["context"])
        more = {}
        if own is not None:
            ms = own["ms"]["median"]
            ratio = round(line["ms"]["median"] / ms, 2)
            more = {"ours_ms": ms, "ours_context": own["context"], "ratio": ratio}
        found.append(line | more)
    return found


def ordered(lines: Sequence[dict], *keys: str) -> list[dict]:
    return sorted(lines, key=lambda line: tuple(line[key] for key in keys))


def table(rows: Sequence[dict], columns: Sequence[Column]) -> list[str]:
    """Lines of a Markdown table."""
    head = [f"| {' | '.join(name for name, _ in columns)} |", f"|{'---|' * len(columns)}"]
    return head + [f"| {' | '.join(_text(value(row)) for _, value in columns)} |" for row in rows]


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def of(key: str, *more: str) -> Callable[[dict], object]:
    """The value of a key, or of a key of a key; None if the line has none."""

    def value(line: dict) -> object:
        found = line
        for name in (key, *more):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    return value


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside first, so that half a file replaces nothing."""
    aside = path.with_name(path.name + ".partial")
    write(aside)
    aside.replace(path)


MS: list[Column] = [
    ("ms", of("ms", "median")),
    ("min", of("ms", "min")),
    ("max", of("ms", "max")),
]
LIMIT: list[Column] = [("limit, ms", of("limit_ms")), ("x limit", of("times_limit"))]
END: list[Column] = [
    ("compilations", of("compilations")),
    ("device peak, GB", of("device_peak_GB_so_far")),
    ("host peak, GB", of("host_peak_GB")),
    ("operators", of("allowed")),
    ("commit", of("commit")),
]
CARD: list[Column] = [
    ("copy, GB/s", of("copy_GB_s")),
    ("bf16 products, TFLOP/s", of("products_TFLOP_s")),
    ("date", of("date")),
    ("jax", of("jax")),
]
DECODE: list[Column] = [
    ("batch", of("batch")),
    ("context", of("context")),
    ("by", of("context_by")),
    *MS,
    *LIMIT,
    ("tokens/s", of("tokens_per_s")),
    ("cache bytes", of("cache_bytes")),
    ("by the formula", of("cache_bytes_by_formula")),
    *END,
]
PEER: list[Column] = [
    ("form", of("form")),
    ("context", of("context")),
    *MS,
    *LIMIT,
    ("cache bytes", of("cache_bytes")),
    ("device peak, GB", of("device_peak_GB")),
    ("ours, ms", of("ours_ms")),
    ("at context", of("ours_context")),
    ("ours is faster by", of("ratio")),
    ("attention", of("attention")),
    ("torch", of("torch")),
    ("transformers", of("transformers")),
]
PREFILL: list[Column] = [
    ("prompt", of("prompt")),
    *MS,
    *LIMIT,
    ("first token, ms", of("first_token_ms", "median")),
    ("tokens/s", of("tokens_per_s")),
    *END,
]
STREAM: list[Column] = [
    ("frames", of("frames")),
    *MS,
    ("99 %", of("ms", "p99")),
    *LIMIT,
    ("host, ms", of("host_ms", "median")),
    ("frames/s", of("frames_per_s")),
    ("without waiting", of("frames_per_s_overlapped")),
    ("first tenth, ms", of("first_tenth_ms")),
    ("last tenth, ms", of("last_tenth_ms")),
    ("first token of an answer, ms", of("answer_first_token_ms", "median")),
    *END,
]
STREAMS: list[Column] = [
    ("streams", of("streams")),
    ("rounds", of("frames")),
    ("read at once", of("rows")),
    *MS,
    *LIMIT,
    ("frames/s", of("frames_per_s")),
    *END,
]
REQUESTS: list[Column] = [
    ("requests", of("requests")),
    ("prompt tokens", of("prompt_tokens")),
    ("new tokens each", of("new_tokens")),
    ("new tokens/s", of("tokens_per_s")),
    ("limit", of("limit_tokens_per_s")),
    ("x limit", of("times_limit")),
    ("x one", of("times_one")),
    ("first token, ms", of("first_token_ms", "median")),
    ("at most", of("first_token_ms", "max")),
    ("longest gap, ms", of("longest_gap_ms")),
    *END,
]
LONG: list[Column] = [
    ("requests", of("requests")),
    ("prompt", of("prompt")),
    ("chunk", of("chunk")),
    ("round without, ms", of("round_ms_without", "median")),
    ("round, ms", of("round_ms", "median")),
    ("longest wait, ms", of("longest_wait_ms")),
    ("in chunks", of("longest_wait_in_chunks")),
    ("its first token, ms", of("first_token_ms")),
    *END,
]
