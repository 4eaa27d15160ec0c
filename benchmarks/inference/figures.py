"""Plots of recorded lines (matplotlib). Each returns None if no line belongs to it."""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def part(lines: Sequence[dict], name: str, key: str, **fixed: object) -> list[dict]:
    """Lines of a part that have a key and these values, in order of the key."""
    found = [
        line
        for line in lines
        if line["part"] == name
        and key in line
        and all(line.get(other) == value for other, value in fixed.items())
    ]
    return sorted(found, key=lambda line: line[key])


def decoding(lines: Sequence[dict]) -> Figure | None:
    """Time of a token and bytes of the cache, against the context."""
    # of a context that was also read token by token, that line
    ours = part(lines, "decode", "context", batch=1, context_by="counters")
    ours += part(lines, "decode", "context", batch=1, context_by="reading")
    if not ours:
        return None
    single = {line["context"]: line for line in ours}
    ours = [single[context] for context in sorted(single)]
    figure, (time, memory) = _figure(2)
    _curve(time, ours, "context", _median, "InfiniteVL")
    _curve(time, ours, "context", lambda line: line["limit_ms"], "limit by the copy rate", "--")
    _curve(memory, ours, "context", lambda line: line["cache_bytes"] / 1e9, "InfiniteVL")
    peers = part(lines, "transformer", "context")
    for form, attention in sorted({(line["form"], line["attention"]) for line in peers}):
        found = part(peers, "transformer", "context", form=form, attention=attention)
        _curve(time, found, "context", _median, f"Transformer, {form}\n({attention})")
    if peers:
        _curve(memory, peers, "context", lambda line: line["cache_bytes"] / 1e9, "Transformer")
        memory.set_yscale("log")
    _label(time, "context, tokens", "ms a token", log=True)
    _label(memory, "context, tokens", "cache, GB", log=True)
    return figure


def batches(lines: Sequence[dict]) -> Figure | None:
    """Tokens a second against the batch."""
    counts = part(lines, "decode", "batch")
    largest: dict[int, dict] = {}
    for line in counts:
        largest[line["batch"]] = max(
            (line, largest.get(line["batch"], line)), key=lambda one: one["tokens_per_s"]
        )
    if len(largest) < 2:
        return None
    figure, (axes,) = _figure(1)
    chosen = list(largest.values())
    _curve(axes, chosen, "batch", lambda line: line["tokens_per_s"], "InfiniteVL")
    _curve(
        axes,
        chosen,
        "batch",
        lambda line: line["batch"] / line["limit_ms"] * 1e3,
        "limit by the copy rate",
        "--",
    )
    _label(axes, "sequences", "tokens a second", log=True)
    return figure


def prompts(lines: Sequence[dict]) -> Figure | None:
    """Prefill and the first token against the length of the prompt."""
    found = part(lines, "prefill", "prompt")
    if not found:
        return None
    figure, (axes,) = _figure(1)
    _curve(axes, found, "prompt", _median, "prefill")
    _curve(axes, found, "prompt", lambda line: line["first_token_ms"]["median"], "first token")
    _curve(axes, found, "prompt", lambda line: line["limit_ms"], "limit", "--")
    _label(axes, "prompt, tokens", "ms", log=True)
    axes.set_yscale("log")
    return figure


def frames(lines: Sequence[dict]) -> Figure | None:
    """Time of a frame over the longest stream."""
    found = part(lines, "stream", "curve_ms")
    if not found:
        return None
    longest = max(found, key=lambda line: line["frames"])
    curve = longest["curve_ms"]
    figure, (axes,) = _figure(1)
    share = longest["frames"] / len(curve)
    axes.plot([(i + 0.5) * share for i in range(len(curve))], curve, label="median of its part")
    axes.axhline(longest["limit_ms"], linestyle="--", color="grey", label="limit")
    _label(axes, "frame", "ms a frame")
    return figure


FIGURES: dict[str, Callable[[Sequence[dict]], Figure | None]] = {
    "decoding": decoding,
    "batches": batches,
    "prefill": prompts,
    "stream": frames,
}


def _figure(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6 * count, 4), layout="constrained", dpi=120)
    return figure, [figure.add_subplot(1, count, i + 1) for i in range(count)]


def _median(line: dict) -> float:
    return line["ms"]["median"]


def _curve(axes: Axes, lines: Sequence[dict], x: str, y: Callable, label: str, style="o-") -> None:
    axes.plot([line[x] for line in lines], [y(line) for line in lines], style, label=label)


def _label(axes: Axes, x: str, y: str, *, log: bool = False) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log:
        axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=None if axes.get_yscale() == "log" else 0)
    axes.grid(alpha=0.3)
    axes.legend()
