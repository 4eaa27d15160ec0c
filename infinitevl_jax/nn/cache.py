"""The decoding cache: an immutable pytree of fixed shape, batch first in every leaf.

The model returns a new cache and keeps none. Branching is a gather over the batch; rolling back is
keeping the old value.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from infinitevl_jax.sharding import constrain


class Cache(NamedTuple):
    """The state of `batch` sequences.

    Attributes:
      layers: one state per layer (`Mixer.state_spec`).
      length: [batch] int32, tokens seen.
      next_position: [batch] int32, rotary position of the next text token: the largest so far + 1.
    """

    layers: tuple
    length: Array
    next_position: Array

    @property
    def nbytes(self) -> int:
        """Bytes of all layer states; works on arrays and on shapes."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))

    def select(self, rows: Array) -> "Cache":
        """Gather the sequences `rows` [n] into a new cache: branch, reorder or drop sequences."""
        return jax.tree.map(lambda leaf: leaf[rows], self)

    def after(self, layers, token_index: Array, positions: Array) -> "Cache":
        """The cache after more tokens.

        Args:
          layers: the layers' new states.
          token_index: [batch, length] int32, -1 is padding.
          positions: [3, batch, length] rotary positions.
        """
        valid = token_index >= 0
        furthest = jnp.max(jnp.where(valid, positions, -1), axis=(0, 2)) + 1
        return Cache(
            layers,
            self.length + valid.sum(1, dtype=jnp.int32),
            jnp.maximum(self.next_position, furthest),
        )


def empty(specs) -> Cache:
    """A zero cache with the shapes of `VLM.cache_spec`, sharded by batch on the ambient mesh."""
    return jax.tree.map(
        lambda s: constrain(jnp.zeros(s.shape, s.dtype), "batch", *[None] * (len(s.shape) - 1)),
        specs,
    )
