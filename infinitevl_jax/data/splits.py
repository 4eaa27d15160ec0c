"""Parts of a file's rows, in the notation of tensorflow_datasets: train[:90%]+train[95%:]."""

import re
from collections.abc import Sequence

import numpy as np

from infinitevl_jax.errors import InfiniteVLError

_PART = re.compile(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")


def select_rows(split: str, count: int, title: str, name: str = "train") -> Sequence[int]:
    """Numbers of the rows that a split names, out of `count`.

    name: what all rows are called.

    Raises:
      InfiniteVLError: the split cannot be read, or it is empty.
    """
    parts = []
    for part in split.split("+"):
        found = _PART.fullmatch(part.strip())
        if found is None or found[1] != name:
            raise InfiniteVLError(
                f"{title}: the split {split!r} cannot be read",
                f'all rows of a file are "{name}"; slices read {name}[:90%], {name}[1000:]',
            )
        start, stop = (_bound(text, count) for text in found.groups()[1:])
        parts.append(range(count)[start:stop])
    rows = parts[0] if len(parts) == 1 else np.concatenate([np.asarray(p, np.int64) for p in parts])
    if not len(rows):
        raise InfiniteVLError(
            f"{title} has no rows in {split!r}", f"it has {count:,} rows; slices read {name}[:90%]"
        )
    return rows


def _bound(text: str | None, count: int) -> int | None:
    if text is None:
        return None
    return round(int(text[:-1]) * count / 100) if text.endswith("%") else int(text)
