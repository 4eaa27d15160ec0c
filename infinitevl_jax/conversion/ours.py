"""Our checkpoint folder: side files, infinitevl_jax.json (the manifest) and params/, one orbax checkpoint of the flat parameter dict.

Leaves are written and read one at a time, so that neither direction holds the model in memory twice.
"""

import contextlib
import logging
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from infinitevl_jax.conversion.files import PARAMS
from infinitevl_jax.conversion.weights import Leaf, complain
from infinitevl_jax.errors import InfiniteVLError

_CHUNK = 1 << 20  # bytes read at once: a device that needs part of a leaf reads little more than that part
_BATCH = 64 << 20  # bytes written at once, a whole leaf at least


class Deferred:
    """A numpy array that is made when its turn to be written comes."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, load: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.load = tuple(shape), np.dtype(dtype), load
        self.ndim, self.size = len(shape), math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize


class _DeferredHandler(ocp.type_handlers.NumpyHandler):
    """Writes leaves a few at a time, as the numpy arrays that they become."""

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        with contextlib.ExitStack() as writes:  # ends only when every write has, whatever failed: nothing runs on
            held = 0
            for value, info, arg in zip(values, infos, args, strict=True):
                for future in await super().serialize([value.load()], [info], [arg]):
                    writes.callback(future.result)
                held += value.nbytes
                if held >= _BATCH:
                    writes.close()
                    held = 0
        return []


@contextlib.contextmanager
def _quiet():
    """One message is enough: orbax logs the traceback of what it then raises, and of the reads it abandons on the way."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        yield
    except BaseException:
        time.sleep(0.2)  # the abandoned ones end
        raise
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


def write_params(folder: Path, params: Mapping[str, Deferred | jax.Array]) -> None:
    """Write params/: Deferred leaves one at a time, jax arrays shard by shard from the processes that hold them."""
    handlers = ocp.type_handlers.create_type_handler_registry(
        (Deferred, _DeferredHandler(deepcopy_host_arrays=False)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK) for name in params}
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save((folder / PARAMS).absolute(), args=ocp.args.PyTreeSave(dict(params), save_args=args))


class Store:
    """Reads params/ leaf by leaf.

    Attributes:
      shapes, dtypes: by our name.
    """

    def __init__(self, folder: Path):
        self.path = (folder / PARAMS).absolute()
        if not self.path.is_dir():
            raise InfiniteVLError(f"{folder} has no {PARAMS}/", "import or save the model again")
        self._checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        tree = self._guard(lambda: dict(self._checkpointer.metadata(self.path).item_metadata.tree))
        self.shapes = {name: tuple(leaf.shape) for name, leaf in tree.items()}
        self.dtypes = {name: np.dtype(leaf.dtype) for name, leaf in tree.items()}

    def check(self, expected: Sequence[Leaf], what: str) -> None:
        """Raise InfiniteVLError unless exactly these leaves are stored."""
        complain({leaf.name: leaf.shape for leaf in expected}, self.shapes, str(self.path), what)

    def read(self, name: str, sharding: Sharding | None = None, dtype=None) -> np.ndarray | jax.Array:
        """A leaf as a numpy array, or, given a sharding, as a jax array of which each device has read its own part."""
        if sharding is None:
            args = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            args = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=self.shapes[name], dtype=dtype or self.dtypes[name])
        item = {name: jax.ShapeDtypeStruct(self.shapes[name], self.dtypes[name])}
        restore = ocp.args.PyTreeRestore(item=item, restore_args={name: args}, partial_restore=True)
        return self._guard(lambda: self._checkpointer.restore(self.path, args=restore))[name]

    def _guard(self, action: Callable):
        try:
            with _quiet():
                return action()
        except (ValueError, OSError, KeyError, AttributeError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise InfiniteVLError(f"{self.path} cannot be read: {reason}", "the checkpoint is damaged: copy or import it again") from error
