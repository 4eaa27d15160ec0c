"""Our checkpoint folder: side files, infinitevl_jax.json (the manifest) and params/, one orbax
checkpoint of the flat parameter dict.

Leaves are written and read one at a time, so that neither direction holds the model in memory
twice.
"""

import contextlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.sharding import Sharding

from infinitevl_jax.checkpoints.files import PARAMS
from infinitevl_jax.checkpoints.source import FLOATS
from infinitevl_jax.checkpoints.weights import Leaf, complain
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import check_regular

_CHUNK = (
    1 << 20
)  # bytes read at once: a device that needs part of a leaf reads little more than that part
_BATCH = 64 << 20  # bytes written at once, a whole leaf at least


class Deferred:
    """A numpy array that is made when its turn to be written comes."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, load: Callable[[], np.ndarray]):
        self.shape, self.dtype, self.load = tuple(shape), np.dtype(dtype), load
        self.ndim, self.size = len(shape), math.prod(shape)
        self.nbytes = self.size * self.dtype.itemsize


def _to_its_end(action: Callable, stop: threading.Event):
    """The result of `action`, from a thread of its own, whose end is awaited whatever happens here.

    Ctrl-C and other signals are raised in the main thread. Inside orbax they would leave tasks and
    writes running behind them; here they end the wait, and set `stop`.
    """
    outcome, running = Future(), threading.Lock()

    def run() -> None:
        with running:
            if stop.is_set():  # the wait was over before this began
                return
            try:
                outcome.set_result(action())
            except BaseException as error:
                outcome.set_exception(error)

    try:
        threading.Thread(target=run, name="orbax").start()
        return outcome.result()
    except BaseException:
        stop.set()
        with running:
            raise


class _DeferredHandler(ocp.type_handlers.NumpyHandler):
    """Writes leaves a few at a time, as the numpy arrays that they become, until told to stop."""

    def __init__(self, stop: threading.Event):
        super().__init__(deepcopy_host_arrays=False)
        self._stop = stop

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs()] * len(values)
        with (
            contextlib.ExitStack() as writes
        ):  # ends only when every write has, whatever failed: nothing runs on
            held = 0
            for value, info, arg in zip(values, infos, args, strict=True):
                if self._stop.is_set():
                    raise InterruptedError("stopped while writing")
                for future in await super().serialize([value.load()], [info], [arg]):
                    writes.callback(future.result)
                held += value.nbytes
                if held >= _BATCH:
                    writes.close()
                    held = 0
        return []


def write_params(folder: Path, params: Mapping[str, Deferred | jax.Array]) -> None:
    """Write params/: Deferred leaves one at a time, jax arrays shard by shard from the processes
    that hold them."""
    stop = threading.Event()
    handlers = ocp.type_handlers.create_type_handler_registry(
        (Deferred, _DeferredHandler(stop)), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    args = {name: ocp.SaveArgs(chunk_byte_size=_CHUNK) for name in params}

    def write() -> None:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(
                (folder / PARAMS).absolute(), args=ocp.args.PyTreeSave(dict(params), save_args=args)
            )

    _to_its_end(write, stop)


class Store:
    """Reads params/ leaf by leaf.

    Attributes:
      shapes, dtypes: by our name.
    """

    def __init__(self, folder: Path):
        self.path = (folder / PARAMS).absolute()
        if not self.path.is_dir():
            raise InfiniteVLError(f"{folder} has no {PARAMS}/", "import or save the model again")
        check_regular(self.path)
        # The handler alone: a Checkpointer also looks for files of its own, which a training step
        # lacks, and warns.
        self._handler = ocp.PyTreeCheckpointHandler()
        self._guard(self._open)
        leaves = self._guard(self._metadata)
        self.shapes = {name: shape for name, (shape, _) in leaves.items()}
        self.dtypes = {name: dtype for name, (_, dtype) in leaves.items()}
        if strange := [name for name, dtype in self.dtypes.items() if dtype not in FLOATS]:
            raise InfiniteVLError(
                f"{self.path}: {strange[0]} is {self.dtypes[strange[0]]}",
                "weights are bf16, f16 or f32: import or save the model again",
            )

    def _open(self) -> None:
        """Look the database through once: orbax reads many leaves at once, and reports each that
        then fails."""
        if (self.path / "manifest.ocdbt").exists():
            files = {"driver": "file", "path": f"{self.path}/"}
            tensorstore.KvStore.open({"driver": "ocdbt", "base": files}).result().list().result()

    def _metadata(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        found = self._handler.metadata(self.path).tree
        return {
            name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in dict(found).items()
        }

    def check(self, expected: Sequence[Leaf], what: str) -> None:
        """Raise InfiniteVLError unless exactly these leaves are stored."""
        complain({leaf.name: leaf.shape for leaf in expected}, self.shapes, str(self.path), what)

    def read(
        self, name: str, sharding: Sharding | None = None, dtype=None
    ) -> np.ndarray | jax.Array:
        """A leaf as a numpy array, or, given a sharding, as a jax array of which each device has
        read its own part."""
        if sharding is None:
            args = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            args = ocp.ArrayRestoreArgs(
                sharding=sharding, global_shape=self.shapes[name], dtype=dtype or self.dtypes[name]
            )
        item = {name: jax.ShapeDtypeStruct(self.shapes[name], self.dtypes[name])}
        restore = ocp.args.PyTreeRestore(item=item, restore_args={name: args}, partial_restore=True)
        return self._guard(lambda: self._handler.restore(self.path, args=restore))[name]

    def _guard(self, action: Callable):
        try:
            return _to_its_end(action, threading.Event())
        except (
            Exception
        ) as error:  # orbax does not say which it raises, and some are Exception itself
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise InfiniteVLError(
                f"{self.path} cannot be read: {reason}",
                "the checkpoint is damaged: copy or import it again",
            ) from error
