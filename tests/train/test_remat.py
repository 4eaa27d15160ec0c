"""Residuals of the backward pass: kernels are counted in programs lowered for a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from infinitevl_jax.train.step import REMAT
from pallas_kernels.attention import Mask
from pallas_kernels.attention.hopper import attention as attention_hopper
from pallas_kernels.gated_delta_rule.hopper import gated_delta_rule as delta_hopper

ROWS = jax.ShapeDtypeStruct((1, 128), jnp.int32)


def attention(x, token_index):
    heads = jnp.sin(x.reshape(1, 128, 4, 128))
    out, _ = attention_hopper.attention(
        heads,
        heads[:, :, :2],
        heads[:, :, 2:],
        token_index,
        token_index,
        None,
        None,
        Mask(window=64, aligned=True),
        0.1,
    )
    return jnp.sin(out).sum()


def delta_rule(x, token_index):
    heads = jnp.sin(x.reshape(1, 128, 2, 256))
    gates = -jnp.exp(heads[..., 0].astype(jnp.float32))
    out, _ = delta_hopper.gated_delta_rule(
        heads[..., :128], heads[..., 128:], heads, gates, jnp.exp(gates), token_index=token_index
    )
    return jnp.sin(out).sum()


@pytest.mark.parametrize("layer, forward, backward", [(attention, 1, 1), (delta_rule, 2, 2)])
@pytest.mark.parametrize("remat, again", [("none", 0), ("dots", 0), ("full", 1)])
def test_dots_keeps_what_kernels_made(layer, forward, backward, remat, again):
    """Sines surround the mixer, so that their gradients need its inputs and its result."""
    x = jax.ShapeDtypeStruct((1, 128, 512), jnp.bfloat16)
    step = jax.value_and_grad(
        lambda x, token_index: REMAT[remat](partial(layer, token_index=token_index))(x)
    )
    text = jax.jit(step).trace(x, ROWS).lower(lowering_platforms=("cuda",)).as_text()
    calls = count(text, "@main", {})
    assert calls == forward * (1 + again) + backward


def count(text: str, function: str, known: dict[str, int]) -> int:
    """Number of kernel calls of a StableHLO function, including those of its callees."""
    if function not in known:
        body = text.split(
            f"func.func public {function}("
            if function == "@main"
            else f"func.func private {function}("
        )[1].split("\n  }")[0]
        called = [word.split("(")[0] for word in body.split(" call ")[1:]]
        known[function] = body.count("custom_call @mosaic_gpu_v2") + sum(
            count(text, name, known) for name in called
        )
    return known[function]
