"""What a cache must be for a call: one of this model, not used up, with room for the tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax import Array

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.inputs.arrays import INT32_MAX
from infinitevl_jax.inputs.model_inputs import ModelInputs
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.nn.vlm import VLM


def same_shapes(cache: Cache, spec: Cache) -> bool:
    """Whether a cache has the states, shapes and dtypes of `spec`."""
    leaves = jax.tree.leaves(cache), jax.tree.leaves(spec)
    return jax.tree.structure(cache) == jax.tree.structure(spec) and all(
        (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        for leaf, wanted in zip(*leaves, strict=True)
    )


@dataclass(frozen=True)
class CacheChecks:
    """The checks of one model. Each raises InfiniteVLError.

    spec: (batch, max_length) -> shapes of this model's cache.
    """

    model: VLM
    spec: Callable[[int, int | None], Cache]

    def check_cache(self, cache: Cache | None) -> None:
        """A cache is one of this model, and still there."""
        if cache is None:
            return
        if not isinstance(cache, Cache):
            raise InfiniteVLError(
                f"cache is a {type(cache).__name__}",
                "pass the cache of an earlier call's output, or init_cache(batch)",
            )
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache) if isinstance(leaf, Array)):
            raise InfiniteVLError(
                "this cache has been used up by decode",
                "go on from the cache that came with the last token",
            )
        # the room of a cache is known only of one with this model's kinds of states
        same = jax.tree.structure(cache) == jax.tree.structure(self.spec(1, 1))
        if not same or not same_shapes(
            cache, self.spec(len(cache.length), self.model.max_length(cache))
        ):
            raise InfiniteVLError(
                "the cache is another model's, or of another dtype",
                "make it with this model: init_cache(batch)",
            )

    def check_call(self, cache: Cache | None, inputs: ModelInputs) -> None:
        """A cache can take these inputs."""
        if cache is not None and inputs.decoder.segment_ids.any():
            raise InfiniteVLError(
                "position_ids start anew inside a row: several sequences are packed there, and a"
                " cache holds one sequence a row",
                "pass one row a sequence, padded with attention_mask, where a cache or new tokens"
                " are wanted",
            )
        self.check_room(cache, inputs.counts)

    def check_room(self, cache: Cache | None, tokens: np.ndarray | int) -> None:
        """A cache takes so many tokens more: of the sequences it was made for, no more in full
        attention than that, and of any model no more than its counters count.

        tokens: [batch], or one number for all sequences.
        """
        if cache is None:
            return
        held = np.asarray(cache.length, np.int64)
        if isinstance(tokens, np.ndarray) and len(held) != len(tokens):
            raise InfiniteVLError(
                f"the cache holds {len(held)} sequences, input_ids {len(tokens)}",
                "pass one row a sequence, or cache.select(rows) to branch or leave some out",
            )
        needed = (held + tokens).max()
        capacity = self.model.max_length(cache)
        if capacity is not None and needed > capacity:
            raise InfiniteVLError(
                f"the cache was made for {capacity} tokens, this call brings it to {needed}",
                "make it with a larger max_length",
            )
        furthest = max(needed, (np.asarray(cache.next_position, np.int64) + tokens).max())
        if furthest > INT32_MAX:
            raise InfiniteVLError(
                f"this call brings a sequence to {furthest:,} tokens or positions, its cache counts"
                f" to {INT32_MAX:,}",
                "start anew with init_cache(batch): what lies further back than the window is in"
                " the states alone",
            )
