"""What a call of the model returns."""

from functools import cached_property

import jax
import numpy as np
from jax import Array

from infinitevl_jax.nn.cache import Cache


class Output:
    """Logits [batch, length, vocab] (f32), and, where asked for, the cache and every layer's hidden
    states.

    The device computes rows that are padded to a bucket; they are cut to the caller's length when
    they are first read.
    """

    def __init__(
        self,
        logits: Array,
        cache: Cache | None,
        hidden: tuple[Array, ...] | None,
        shift: np.ndarray,
        width: int,
        columns: int | None,
    ):
        """
        Args:
          logits: [batch, bucket, vocab], or [batch, columns, vocab] where only these were computed.
          hidden: None, or for each layer [batch, bucket, hidden].
          shift: [batch] left padding that the rows are without.
          width: the caller's length. columns: None, or the number of columns that logits has.
        """
        self._logits, self._hidden, self.cache = logits, hidden, cache
        self._shift, self._width, self._whole = shift, width, columns is None

    @cached_property
    def logits(self) -> Array:
        return _cut(self._logits, self._shift, self._width) if self._whole else self._logits

    @cached_property
    def hidden_states(self) -> tuple[Array, ...] | None:
        return (
            None
            if self._hidden is None
            else tuple(_cut(x, self._shift, self._width) for x in self._hidden)
        )


def _cut(x: Array, shift: np.ndarray, width: int) -> Array:
    """Put left padding back: [batch, bucket, ...] -> [batch, width, ...]."""
    place = np.maximum(np.arange(width) - shift[:, None], 0)
    if all(device.platform == "cpu" for device in x.devices()):
        # A slice compiles anew for every width, for ever; here the host can read where the device
        # wrote.
        host = np.asarray(x)
        host = np.take_along_axis(host, place[:, :, None], 1) if shift.any() else host[:, :width]
        return jax.device_put(host, x.sharding)
    return jax.vmap(lambda row, place: row[place])(x, place) if shift.any() else x[:, :width]
