"""A video stream's memory in a safetensors file: its cache, and what else it has to know."""

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jax import Array
from msgspec import Meta

from infinitevl_jax.checkpoints.safetensors_file import SafetensorsFile, SafetensorsWriter
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.reading import decode_json
from infinitevl_jax.serve.infinitevl import InfiniteVL
from infinitevl_jax.writing import storage, sync

FORMAT = 2

_Count = Annotated[int, Meta(ge=0)]
_Seconds = Annotated[float, Meta(ge=0, le=1e9)] | None


class Memory(msgspec.Struct, frozen=True):
    """What a stream remembers beside its cache."""

    layout: str
    system: str | None
    frames: _Count
    dropped: _Count
    seconds: _Seconds  # of the newest frame
    first: _Seconds


class _Header(msgspec.Struct):
    format: int
    model: str
    memory: Any


def save_stream(path: Path, memory: Memory, cache: Cache, model: InfiniteVL) -> None:
    """Write a file, whole or not at all. Raises StorageError for a disk that is full."""
    leaves = _named(jax.tree.map(np.asarray, cache))
    facts = {"format": FORMAT, "model": _fingerprint(model), "memory": msgspec.to_builtins(memory)}
    aside = path.with_name(f".{path.name}.partial")
    with storage(path, "the stream is as it was: save it again"):
        aside.unlink(missing_ok=True)
        try:
            entries = [(name, leaf.dtype, leaf.shape) for name, leaf in leaves.items()]
            writer = SafetensorsWriter(aside, entries, {"stream": json.dumps(facts)})
            try:
                for name, leaf in leaves.items():
                    writer.put(name, leaf)
                writer.close()
            except BaseException:
                writer.abort()
                raise
            sync(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync(path.parent)


def load_stream(path: Path, wanted: Cache, model: InfiniteVL) -> tuple[Memory, Cache]:
    """Read a file that `save_stream` wrote.

    wanted: a cache of this model (shapes are enough).

    Raises InfiniteVLError for a file that is cut short, no stream, or another model's.
    """
    file = SafetensorsFile(path)
    if "stream" not in file.metadata:
        raise InfiniteVLError(f"{path} is no saved stream", "save one with VideoStream.save")
    header = decode_json(file.metadata["stream"], _Header, str(path))
    names = _named(wanted)
    found = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    same = found == {name: (np.dtype(leaf.dtype), leaf.shape) for name, leaf in names.items()}
    if not same or (header.format, header.model) != (FORMAT, _fingerprint(model)):
        raise InfiniteVLError(
            f"{path} is a stream of another model, dtype or format",
            "load it with the weights, the dtype and the max_length that it was saved with",
        )
    memory = decode_json(json.dumps(header.memory), Memory, str(path))
    leaves = [np.array(file.array(name)) for name in names]
    return memory, jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _named(cache: Cache) -> dict[str, Any]:
    """The cache's arrays by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(cache)
    }


def _fingerprint(model: InfiniteVL) -> str:
    """Digest of a model: configuration, dtype and weights. The same on any device or mesh."""
    sums = {name: int(_sum(model.params[name])) for name in sorted(model.params)}
    text = repr((model.config, model.dtype.name, sums))
    return hashlib.sha256(text.encode()).hexdigest()


@jax.jit
def _sum(x: Array) -> Array:
    """Sum of the values' bits modulo 2^32: whole numbers, so its order does not matter."""
    kind = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jnp.sum(jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32), dtype=jnp.uint32)
