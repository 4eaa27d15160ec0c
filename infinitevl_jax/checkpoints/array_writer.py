"""Arrays to disk: FOLDER/NAME, an Orbax checkpoint of a flat dict, written in parts.

Memory holds one part, or one array where that is larger. Several processes write one checkpoint
together: all of them call `write_arrays` with the same arrays in the same order.

A thread beside the training writes arrays that are on the host (`on_host`), and may not ask
anything of the devices: between processes, the order of what devices do together is that of the
training. Orbax's partial saves agree through the devices; there, arrays are written whole, by the
checkpointer that agrees through the coordination service.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import orbax.checkpoint.experimental.v1 as ocp

from infinitevl_jax.checkpoints.checksums import Part, parts_of, write_checksums
from infinitevl_jax.writing import check_room

_CHUNK = 1 << 20  # bytes read at once: who needs part of an array reads little more than that
_PART = 64 << 20  # bytes written at once


@dataclass(frozen=True)
class LazyArray:
    """An array that is made when its turn to be written comes.

    Attributes:
      name: on disk.
      nbytes: its size.
      load: makes it: a numpy array, or a jax array of which each process writes its own shards.
    """

    name: str
    nbytes: int
    load: Callable[[], np.ndarray | jax.Array]


def layers_of(value: jax.Array | np.ndarray, names: Sequence[str]) -> list[LazyArray]:
    """A parameter as its layers on disk. A layer is cut out of a stack when its turn comes, on the
    devices that hold it: there is no second copy of the stack.

    Args:
      names: on disk: of the layers along the leading axis; one name for an array that is no stack.
    """
    if len(names) == 1:
        # A copy, because jax keeps what was moved to the host as long as the array lives.
        load = (lambda: value) if isinstance(value, np.ndarray) else partial(jnp.copy, value)
        return [LazyArray(names[0], value.nbytes, load)]
    return [
        LazyArray(name, value.nbytes // len(names), partial(_layer, value, i))
        for i, name in enumerate(names)
    ]


@jax.jit
def _slice(stack: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def _layer(stack: jax.Array | np.ndarray, layer: int) -> jax.Array | np.ndarray:
    return stack[layer] if isinstance(stack, np.ndarray) else _slice(stack, layer)


def on_host(array: LazyArray) -> LazyArray:
    """The array, made now, as a copy in the host's memory: in several processes, of the shards that
    this one has."""
    value = array.load()
    if isinstance(value, jax.Array):
        if value.is_fully_addressable:
            value = np.asarray(value)
        else:
            there = value.sharding.with_memory_kind("pinned_host")
            value = jax.block_until_ready(jax.device_put(value, there))
    return LazyArray(array.name, array.nbytes, lambda: value)


def write_arrays(
    folder: Path, name: str, arrays: Iterable[LazyArray], *, beside: bool = False
) -> None:
    """Write FOLDER/NAME and the checksums of its arrays. FOLDER exists, FOLDER/NAME does not.

    Args:
      beside: the devices have other work meanwhile; the arrays are those of `on_host`.

    Returns, or raises, when nothing is written any more. Signals are raised in the main thread:
    arrays are made and written in another, which Ctrl-C does not interrupt halfway through a part.

    Raises:
      OSError: the disk is full, or cannot be written. ValueError: the same, as TensorStore says it.
    """
    stop, writing, outcome = threading.Event(), threading.Lock(), Future()

    def write() -> None:
        with writing:
            try:
                if beside and jax.process_count() > 1:
                    _write_whole(folder.absolute(), name, arrays)
                else:
                    _write(folder.absolute(), name, arrays, stop)
                outcome.set_result(None)
            except BaseException as error:
                outcome.set_exception(error)

    try:
        threading.Thread(target=write, name="checkpoint").start()
        outcome.result()
    except BaseException:
        stop.set()
        with writing:  # its end; if it has not begun, it will find that it is to stop
            raise


def _write(folder: Path, name: str, arrays: Iterable[LazyArray], stop: threading.Event) -> None:
    checksums: dict[str, list[Part]] = {}
    part: dict[str, np.ndarray | jax.Array] = {}
    size = 0
    with _context():
        for array in arrays:
            if stop.is_set():
                return
            if part and size + array.nbytes > _PART:
                _write_part(folder / name, part, size)
                part, size = {}, 0
            value = array.load()
            if not isinstance(value, np.ndarray) and value.is_fully_addressable:
                value = np.asarray(value)
            checksums[array.name] = parts_of(value)
            part[array.name], size = value, size + array.nbytes
            del value
        if stop.is_set():
            return
        _write_part(folder / name, part, size)
        ocp.partial.finalize(folder / name)
    write_checksums(folder, name, checksums)


def _write_whole(folder: Path, name: str, arrays: Iterable[LazyArray]) -> None:
    values = {array.name: array.load() for array in arrays}
    shards = (shard for value in values.values() for shard in value.addressable_shards)
    check_room(folder, _CHUNK + sum(x.data.nbytes for x in shards if x.replica_id == 0))
    processes = orbax.checkpoint.options.MultiprocessingOptions(
        active_processes=set(range(jax.process_count())),
        barrier_sync_key_prefix=f"{folder.name}.{name}",
    )
    # replicas would be cut by programs of the devices
    handler = orbax.checkpoint.type_handlers.ArrayHandler(
        use_replica_parallel=False, enable_write_sharding_file=False, array_metadata_store=None
    )
    known = orbax.checkpoint.type_handlers.create_type_handler_registry((jax.Array, handler))
    state = orbax.checkpoint.PyTreeCheckpointHandler(
        use_zarr3=True,
        use_compression=False,
        multiprocessing_options=processes,
        type_handler_registry=known,
    )
    items = orbax.checkpoint.CompositeCheckpointHandler(
        state=state,
        composite_options=orbax.checkpoint.CompositeOptions(multiprocessing_options=processes),
    )
    chunks = dict.fromkeys(values, orbax.checkpoint.SaveArgs(chunk_byte_size=_CHUNK))
    saved = orbax.checkpoint.args.PyTreeSave(values, save_args=chunks)
    with orbax.checkpoint.Checkpointer(items, multiprocessing_options=processes) as writer:
        writer.save(folder / name, args=orbax.checkpoint.args.Composite(state=saved))
    write_checksums(folder, name, {key: parts_of(value) for key, value in values.items()})


def _write_part(path: Path, part: dict[str, np.ndarray | jax.Array], size: int) -> None:
    # Orbax and TensorStore report a full disk from each of their threads: see it before they do.
    check_room(path.parent, size + _CHUNK)
    ocp.partial.save(path, part)


def _context() -> ocp.Context:
    """How Orbax writes: uncompressed (random weights do not shrink) and in small chunks."""
    context = ocp.Context()
    saving = context.array.saving
    saving.use_compression = False
    saving.storage_options.chunk_byte_size = _CHUNK
    saving.enable_write_sharding_file = False  # readers place arrays as they like
    return context
