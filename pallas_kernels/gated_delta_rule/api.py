"""The contract of the gated delta rule and of its one-token step."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.gated_delta_rule.state import DeltaState

RESIDUAL_NAMES = ("gdn_out", "gdn_inverse", "gdn_states")
"""Names for remat policies, the same in every implementation: the result, and the residuals of the
backward pass besides the inputs."""


def gated_delta_rule(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    initial_state: Array | None = None,
    token_index: Array | None = None,
    segment_ids: Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Array, Array]:
    """Run `S = exp(g) S; u = beta (v - k^T S); S = S + k u^T; out = q^T S` over every token of
    every head.

    Args:
        q: [batch, length, key_heads, K], L2-normalised and scaled. Value head h reads key head
            h // (value_heads / key_heads).
        k: [batch, length, key_heads, K], L2-normalised.
        v: [batch, length, value_heads, V].
        g: [batch, length, value_heads] float32, log of the decay, <= 0 (-inf forgets all).
        beta: [batch, length, value_heads] float32.
        initial_state: [batch, value_heads, K, V] float32, state of the sequence that the first
            valid token continues. None: zeros.
        token_index: [batch, length] int, -1 marks a pad (anywhere in the row). None: no pads.
        segment_ids: [batch, length] int. S starts from zero where it changes between one valid
            token and the next. None: one segment.
        implementation: a name, or several in order ("mosaic_gpu,xla"). None: the first that can
            run.

    Returns:
        out [batch, length, value_heads, V] in v's dtype, zero at pads, and the last state
        [batch, value_heads, K, V] float32. A row without valid tokens returns its state bit for
        bit. The contents of pads (NaN included) reach neither results nor gradients.

    Differentiable in the first six. The backward pass saves the inputs and two tensors that a remat
    policy may name: "gdn_inverse" (T) and "gdn_states" (the state before each chunk). If both are
    saved, and "gdn_out" (out) for its readers, nothing sequential is recomputed.

    With float32 inputs all products are in full float32. With bfloat16 inputs, products with the
    state have bfloat16 operands and "gdn_states" is bfloat16. The update of the state has float32
    operands (`Precision.HIGH`), and the carried state is float32.

    Raises ValueError for shapes that do not fit together; Refusal where no allowed implementation
    takes the call.
    """
    # Imports the kernels' compilers.
    from pallas_kernels.gated_delta_rule.implementations import GATED_DELTA_RULE

    call = q, k, v, g, beta, initial_state, token_index, segment_ids
    return GATED_DELTA_RULE(*call, implementation=implementation)


def gated_delta_rule_step(
    inputs: "Inputs",
    weights: "Weights",
    state: DeltaState,
    token_index: Array,
    eps: float,
    *,
    implementation: str | None = None,
) -> tuple[Array, DeltaState]:
    """One token of a Gated DeltaNet layer between its projections.

    `pallas_kernels.gated_delta_rule.step.step` gives arguments and results. implementation: as for
    `gated_delta_rule`.
    """
    from pallas_kernels.gated_delta_rule.implementations import GATED_DELTA_RULE_STEP

    return GATED_DELTA_RULE_STEP(
        inputs, weights, state, token_index, eps, implementation=implementation
    )


class Inputs(NamedTuple):
    """A layer's projections of one token of each sequence, all of one dtype.

    Each may be `pallas_kernels.columns.Columns` of a joint projection instead.
    """

    q: Array  # [batch, key_heads * K] before the convolution, as k and v are
    k: Array
    v: Array  # [batch, value_heads * V]
    gate: Array  # [batch, value_heads * V]
    a: Array  # [batch, value_heads] step size before softplus
    b: Array  # [batch, value_heads] write strength before sigmoid


class Weights(NamedTuple):
    """A layer's own parameters, of any floating dtype."""

    q_conv: Array  # [4, key_heads * K]; row 3 meets the current token
    k_conv: Array
    v_conv: Array  # [4, value_heads * V]
    A_log: Array  # [value_heads]
    dt_bias: Array  # [value_heads]
    norm: Array  # [V] shared by the heads


def arguments(q, k, v, g, beta, initial_state=None, token_index=None, segment_ids=None) -> dict:
    """The arguments of `gated_delta_rule` by name; raises ValueError where shapes do not fit."""
    check(q, k, v, g, beta, initial_state)
    return {
        "q": q, "k": k, "v": v, "g": g, "beta": beta,
        "initial_state": initial_state, "token_index": token_index, "segment_ids": segment_ids,
    }  # fmt: skip


def step_arguments(
    inputs: Inputs, weights: Weights, state: DeltaState, token_index: Array, eps: float
) -> dict:
    """The arguments of `gated_delta_rule_step` by name."""
    return {
        "inputs": inputs,
        "weights": weights,
        "state": state,
        "token_index": token_index,
        "eps": eps,
    }


def check(q, k, v, g, beta, initial_state) -> None:
    """Raise ValueError unless all shapes follow from k's, the number of value heads and their
    width."""
    batch, length, key_heads, width = k.shape
    grouped = key_heads and v.shape[2] % key_heads == 0
    heads = v.shape[2] if grouped else key_heads
    gates = batch, length, heads
    wanted = {
        "q": (q, k.shape),
        "v": (v, (*gates, v.shape[3])),
        "g": (g, gates),
        "beta": (beta, gates),
    }
    if initial_state is not None:
        wanted["initial_state"] = initial_state, (batch, heads, width, v.shape[3])
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            fit = (
                f"as many heads, tokens and rows as k, which is {list(k.shape)} (v, g and beta: or"
                " a multiple of its heads)"
            )
            raise ValueError(
                f"gated_delta_rule: {name} is {list(x.shape)}\n  -> give it {list(shape)}: {fit}"
            )


def repeat_key_heads(x: Array, heads: int, axis: int = 2) -> Array:
    """The key head of each value head: [..., key_heads, ...] -> [..., value_heads, ...]."""
    return x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis)
