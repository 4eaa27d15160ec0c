"""The state of a Gated DeltaNet layer between calls, for each sequence."""

from typing import NamedTuple

from jax import Array


class DeltaState(NamedTuple):
    """The state of the delta rule, and the last inputs of the short convolutions, oldest first."""

    recurrent_state: Array  # [batch, value_heads, K, V] float32
    q_conv_state: Array  # [batch, conv_size - 1, key_heads * K]
    k_conv_state: Array
    v_conv_state: Array  # [batch, conv_size - 1, value_heads * V]
