"""Arrays from disk: any slice of any array of FOLDER/NAME, an Orbax checkpoint of a flat dict.

They are read by TensorStore, whose format Orbax writes (Zarr arrays in an OCDBT database): it reads
a slice into host memory, and raises one exception where a file is damaged. Orbax reads whole
arrays or a device's shard, and logs an error for each array that it cannot open.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorstore

from infinitevl_jax.checkpoints.checksums import Part, is_intact, read_checksums
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import check_regular

_HEADERS = {"zarr.json": "zarr3", ".zarray": "zarr"}  # an array's own file -> TensorStore's driver
_AGAIN = "the checkpoint is damaged: copy or import it again"


class ArrayReader:
    """Reads FOLDER/NAME.

    Attributes:
      path: FOLDER/NAME.
      shapes, dtypes: by name on disk.
    """

    def __init__(self, folder: Path, name: str):
        self.path = (folder / name).absolute()
        if not self.path.is_dir():
            raise InfiniteVLError(f"{folder} has no {name}/", "import or save the model again")
        check_regular(self.path)
        old = is_format_2(folder, name)
        self._checksums: Mapping[str, Sequence[Part]] = {} if old else read_checksums(folder, name)
        with self._errors():
            self._arrays = _open_all(self.path if old else self.path / "state")
        self.shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        self.dtypes = {name: array.dtype.numpy_dtype for name, array in self._arrays.items()}
        if not old and self._checksums.keys() != self.shapes.keys():
            strange = min(self._checksums.keys() ^ self.shapes.keys())
            raise InfiniteVLError(
                f"{self.path} and its checksums do not have the same arrays: {strange}", _AGAIN
            )

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """array[index] with steps of 1, or all of it.

        Its bytes are compared with the checksums of the parts that it covers wholly: of all of
        them, where the whole array is read.

        Raises:
          InfiniteVLError: a file is damaged, or its bytes are not those that were written.
        """
        array = self._arrays[name]
        with self._errors():
            value = np.asarray((array[index] if index else array).read().result())
        start = [part.start or 0 for part in index] or [0] * array.ndim
        if not is_intact(value, start, self._checksums.get(name, ())):
            raise InfiniteVLError(
                f"{self.path}: {name} does not have the bytes that were written", _AGAIN
            )
        return value

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore raises ValueError
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise InfiniteVLError(f"{self.path} cannot be read: {reason}", _AGAIN) from error


def is_format_2(folder: Path, name: str) -> bool:
    """Whether FOLDER/NAME was written before checkpoints had layers and checksums."""
    return (folder / name).is_dir() and not (folder / name / "state").is_dir()


def _open_all(database: Path) -> dict[str, tensorstore.TensorStore]:
    """Name -> array, in the order of the names."""
    files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{database}/"}}
    context = tensorstore.Context()
    keys = tensorstore.KvStore.open(files, context=context).result().list().result()
    pending = {}
    for key in keys:
        name, _, file = key.decode().rpartition("/")
        if driver := _HEADERS.get(file):
            spec = {"driver": driver, "kvstore": {**files, "path": f"{name}/"}}
            pending[name] = tensorstore.open(spec, context=context, open=True, read=True)
    return {name: array.result() for name, array in pending.items()}
