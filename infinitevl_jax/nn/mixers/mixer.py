"""What the decoder asks of a token mixer."""

from typing import Any

from flax import nnx
from jax import Array

from infinitevl_jax.nn.token_info import TokenInfo


class Mixer(nnx.Module):
    """The part of a decoder layer that lets tokens see each other.

    A subclass is made as `factory(config: TextConfig, ops: Ops, rngs: Rngs)` and registered under a
    layer type (`infinitevl_jax.nn.mixers.register_mixer`).
    """

    def state_spec(self, batch: int, max_length: int | None, dtype) -> Any:
        """Shapes and dtypes of what the layer keeps of `batch` sequences: its part of the cache.

        Args:
          max_length: the most tokens of a sequence; None: any number.
          dtype: of activations.

        Returns a pytree of jax.ShapeDtypeStruct, batch first in each.
        """
        raise NotImplementedError

    def max_length(self, state: Any) -> int | None:
        """The most tokens that a state has room for; None where its size follows no length."""
        return None

    def __call__(self, x: Array, state: Any | None, info: TokenInfo) -> tuple[Array, Any | None]:
        """x [batch, length, width] -> the same shape, and the new state (None in training).

        Pads, token_index -1, leave a state as it is.
        """
        raise NotImplementedError
