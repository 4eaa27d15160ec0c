"""What a conversation leaves behind: one fixed-shape pytree, batch leading every leaf, nothing on
the module.

Because it is a plain value, branching is a gather over the batch, a rollback is keeping the old
one, and two conversations cannot touch each other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from infinitevl_jax.config.model import FULL, LINEAR, SLIDING, ModelConfig
from infinitevl_jax.sharding import constrain


class Cache(NamedTuple):
    """The state of `batch` sequences."""

    layers: tuple  # one state a layer: KVCache or DeltaState
    length: Array  # [batch] int32 tokens seen
    next_position: (
        Array  # [batch] int32 rotary position of the next text token: the largest so far + 1
    )

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' states."""
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


def cache_bytes(config: ModelConfig, batch: int, dtype, max_length: int = 0) -> int:
    """Bytes that `batch` sequences keep, by formula.

    A window layer holds `sliding_window` keys and values, a full-attention layer `max_length`; a
    Gated DeltaNet layer its f32 state and the last conv_size - 1 inputs of three convolutions.
    """
    text, item = config.text, jnp.dtype(dtype).itemsize
    slot = 2 * text.num_key_value_heads * text.head_dim * item
    keys, values = (
        text.num_linear_heads * text.linear_head_dim,
        text.num_linear_heads * text.linear_value_dim,
    )
    linear = 4 * keys * text.linear_value_dim + (text.conv_size - 1) * (2 * keys + values) * item
    sizes = {SLIDING: slot * text.sliding_window, FULL: slot * max_length, LINEAR: linear}
    return batch * sum(sizes[kind] for kind in text.layer_types)
