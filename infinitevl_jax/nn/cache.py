"""What a conversation leaves behind: one fixed-shape pytree, batch leading every leaf, nothing on
the module.

Because it is a plain value, branching is a gather over the batch, a rollback is keeping the old
one, and two conversations cannot touch each other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from infinitevl_jax.sharding import constrain


class Cache(NamedTuple):
    """The state of `batch` sequences."""

    layers: tuple  # the state of each layer's mixer (`Mixer.state_spec`)
    length: Array  # [batch] int32 tokens seen
    # [batch] int32 rotary position of the next text token: the largest so far + 1
    next_position: Array

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' states (of arrays, or of their shapes)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.layers))

    def select(self, rows: Array) -> "Cache":
        """Sequences `rows` [n] of this cache as a new one: branching (repeat a row), reordering, or
        leaving some out."""
        return jax.tree.map(lambda leaf: leaf[rows], self)


def empty(specs) -> Cache:
    """A cache of zeros from `VLM.cache_spec`; on a mesh each device holds its own sequences."""
    return jax.tree.map(
        lambda s: constrain(jnp.zeros(s.shape, s.dtype), "batch", *[None] * (len(s.shape) - 1)),
        specs,
    )
