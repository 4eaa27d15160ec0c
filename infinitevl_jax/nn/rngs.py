"""Random keys for initialisation.

`nnx.Rngs` keeps its counter as a traced array, which makes building a deep model slow.
"""

import jax
from jax import Array


class Rngs:
    """Returns a new key at every call."""

    def __init__(self, key: Array):
        self._key, self._drawn = key, 0

    def __call__(self) -> Array:
        self._drawn += 1
        return jax.random.fold_in(self._key, self._drawn)
