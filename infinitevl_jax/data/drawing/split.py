"""What is held out, decided by name: the same name is on the same side in every run."""

import zlib
from collections.abc import Iterable

TRAIN, TEST = "train", "test"


def place(name: str) -> float:
    """A number from 0 to 1 that is spread evenly over names."""
    return zlib.crc32(name.encode("utf-8")) / 2**32


def side(names: Iterable[str], part: str, share: float) -> list[str]:
    """Those of the names that a part ("train" or "test") has, in the order of the alphabet.

    The `share` of the names that come first by `place` are held out: at least one of several, and
    none of one.
    """
    ordered = sorted(set(names), key=lambda name: (place(name), name))
    if len(ordered) == 1:
        return [] if part == TEST else ordered
    cut = min(max(1, round(share * len(ordered))), len(ordered) - 1)
    return sorted(ordered[:cut] if part == TEST else ordered[cut:])
