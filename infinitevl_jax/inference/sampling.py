"""From logits to the next token: greedy, or sampled with temperature, top-k and top-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from infinitevl_jax.errors import InfiniteVLError


@dataclass(frozen=True)
class Sampling:
    """How to choose. temperature 0 is greedy; top_k 0 and top_p 1 keep every token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InfiniteVLError(
                f"sampling with temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}",
                "temperature >= 0, top_k >= 0 and 0 < top_p <= 1",
            )


def choose(logits: Array, key: Array, sampling: Sampling) -> Array:
    """[batch, vocab] logits -> [batch] int32 tokens."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = logits.astype(jnp.float32)
    logits = (logits - jnp.max(logits, -1, keepdims=True)) / sampling.temperature  # a cold temperature cannot overflow
    if sampling.top_k:
        kth = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.sort(logits, -1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(order, -1), -1) - jax.nn.softmax(order, -1)
        # the smallest set of tokens whose probability reaches top_p: those with less than that before them
        least = jnp.min(jnp.where(before < sampling.top_p, order, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)
