"""The interface of token mixers."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax import Array

from infinitevl_jax.nn.token_info import TokenInfo


class Mixer(nnx.Module):
    """The part of a decoder layer that mixes tokens.

    Subclasses are created as `make(config: TextConfig, ops: Ops)` and registered by
    layer type (`infinitevl_jax.nn.mixers.register_mixer`).
    """

    first_joint: str | None = None

    def state_spec(self, batch: int, max_length: int | None, dtype) -> Any:
        """Shapes and dtypes of the layer's part of the cache.

        Args:
          max_length: largest number of tokens per sequence; None is unlimited.
          dtype: activation dtype.

        Returns:
          A pytree of `jax.ShapeDtypeStruct`, batch first.
        """
        raise NotImplementedError

    def max_length(self, state: Any) -> int | None:
        """Largest number of tokens that `state` can hold; None if its size is fixed."""
        return None

    def __call__(self, x: Array, state: Any | None, info: TokenInfo) -> tuple[Array, Any | None]:
        """Mix the tokens of x [batch, length, width].

        Padding (token_index -1) leaves the state unchanged.

        Returns:
          The output, with the shape of x, and the new state (None in training).
        """
        raise NotImplementedError

    def step(
        self,
        x: Array,
        norm: Callable[[Array], Array],
        state: Any,
        info: TokenInfo,
        prefetch: Array | None = None,
    ) -> tuple[Array, Any]:
        """x + mix(norm(x)) for one token of each sequence, x [batch, 1, width]: the mixer with what
        stands around it in its layer. prefetch: the matrix that is read after it.

        Decoding calls it. A mixer overrides it where one token has a faster way. Its joint input
        projections, if it has some, are `first_joint`: the layer before prefetches them.
        """
        mixed, state = self(norm(x), state, info)
        return x + mixed, state
