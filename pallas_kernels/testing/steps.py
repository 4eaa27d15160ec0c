"""Token steps as operators of the parity matrix: several tokens in sequence, so that each one uses
the state that the last one left."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation


def in_a_row(step: Callable) -> Callable:
    """`step(*inputs, *weights, state, index, **rule) -> out, state` for several tokens of each
    sequence.

    All arrays of `inputs`, index and out have a leading axis of tokens. The state comes in before
    the first token and is returned after the last.
    """

    def run(inputs, weights, state, token_index, **rule):
        outs = []
        for token in range(len(token_index)):
            out, state = step(*_token(inputs, token), *weights, state, token_index[token], **rule)
            outs.append(out)
        return jnp.stack(outs), state

    return run


def implementation_in_a_row(implementation: Implementation) -> Implementation:
    """The same for a token step's implementation. It supports what the step supports for the first
    token."""

    def supports(inputs, weights, state, token_index, **rule):
        return implementation.supports(*_token(inputs, 0), *weights, state, token_index[0], **rule)

    return dataclasses.replace(implementation, run=in_a_row(implementation.run), supports=supports)


def _token(inputs, token: int):
    return jax.tree.map(lambda x: x[token], inputs)
