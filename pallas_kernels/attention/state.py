"""What attention keeps of each sequence between calls."""

from typing import NamedTuple

from jax import Array


class KVCache(NamedTuple):
    """Keys (after rotary embedding) and values of the last tokens, as a ring: token i is in slot i
    mod capacity."""

    k: Array  # [batch, capacity, kv_heads, head_dim]
    v: Array
