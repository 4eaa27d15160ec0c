"""Results by kind and findings by cause."""

from collections import Counter, defaultdict

VERDICTS = ("right", "refused", "raw error", "slow", "big", "wrong", "outside")
GOOD = ("right", "refused")


def table(results: list[dict]) -> str:
    """One line a kind, one column a verdict, and the sum."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for result in results:
        counts[result["kind"]][result["verdict"]] += 1
    lines = [f"{'kind':<14}" + "".join(f"{v:>11}" for v in VERDICTS)]
    rows = [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]
    return "\n".join(
        lines
        + [f"{kind:<14}" + "".join(f"{found[v]:>11,}" for v in VERDICTS) for kind, found in rows]
    )


def causes(results: list[dict]) -> list[tuple[tuple, list[dict]]]:
    """Findings that have kind, verdict and place in common, the most frequent first."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for result in results:
        if result["verdict"] not in GOOD:
            groups[result["kind"], result["verdict"], result["place"]].append(result)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def summary(results: list[dict]) -> str:
    """Findings by cause, each with its count and one example."""
    lines = []
    for (kind, verdict, place), found in causes(results):
        example = min(found, key=lambda r: len(r["label"]))
        lines.append(f"{len(found):>4} x {kind}: {verdict} at {place}")
        lines.append(f"       {example['case']}  {example['label']:.160}")
        lines.append(f"       {example['what']:.300}")
    return "\n".join(lines)
