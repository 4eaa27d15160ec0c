"""The kinds of input.

A name, its share of a campaign, and the function (rng, place) -> Case that makes one.
"""

import importlib
from collections.abc import Iterator, Mapping

WEIGHTS = {
    "safetensors": 8,
    "index": 4,
    "manifest": 8,
    "config": 10,
    "adapter": 7,
    "tokenizer": 10,
    "template": 5,
    "preprocessor": 8,
    "preset": 8,
    "run": 4,
    "messages": 8,
    "rows": 5,
    "datafiles": 6,
    "pictures": 9,
    "films": 6,
    "calls": 7,
    "conversations": 3,
}


class _Kinds(Mapping):
    """Imported when they are asked for: the command itself needs no JAX."""

    def __getitem__(self, name: str):
        if name not in WEIGHTS:
            raise KeyError(name)
        return importlib.import_module(f".{name}", __name__).make

    def __iter__(self) -> Iterator[str]:
        return iter(WEIGHTS)

    def __len__(self) -> int:
        return len(WEIGHTS)


KINDS = _Kinds()
