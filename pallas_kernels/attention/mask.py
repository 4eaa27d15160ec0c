"""Which keys a query sees: by order in the sequence, not by rotary position or row."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees, by the token index of both, counted within one sequence.

    causal: a query sees keys at or before itself.
    window: a query sees keys less than `window` tokens away (when causal: itself, window - 1
        before).
        None: no limit.
    sinks: the first `sinks` keys of a sequence are always within the window (but still causal).
    aligned: a promise, not a rule: query row t and key row t are the same token, rows are
        right-padded, and each segment is one range of rows whose token index rises by one a row.
        Blocks that can never meet are then skipped.
    """

    causal: bool = True
    window: int | None = None
    sinks: int = 0
    aligned: bool = False

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"Mask: window is {self.window}\n  -> give 1 or more, or None for no limit"
            )
        if self.sinks < 0:
            raise ValueError(f"Mask: sinks is {self.sinks}\n  -> give 0 or more")

    def visible(
        self,
        q_token_index: jax.Array,
        k_token_index: jax.Array,
        q_segment_ids: jax.Array | None,
        k_segment_ids: jax.Array | None,
    ) -> jax.Array:
        """Booleans [B, Tq, Tk] from token indices (-1 is a pad) and segments, [B, Tq] and [B,
        Tk]."""
        q, k = q_token_index[:, :, None], k_token_index[:, None, :]
        seen = (q >= 0) & (k >= 0)
        if q_segment_ids is not None:
            seen &= q_segment_ids[:, :, None] == k_segment_ids[:, None, :]
        if self.causal:
            seen &= k <= q
        if self.window is not None:
            far = q - k if self.causal else jnp.abs(q - k)
            seen &= (far < self.window) | (k < self.sinks)
        return seen
