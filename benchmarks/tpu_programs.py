"""A Gated DeltaNet layer and a decoding step as programs whose static score for TPU is recorded."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from infinitevl_jax.config.model import ModelConfig, TextConfig, infinitevl_4b
from infinitevl_jax.nn.fuse import fuse
from infinitevl_jax.nn.mixers.gated_delta_net import GatedDeltaNet
from infinitevl_jax.nn.ops import Ops
from infinitevl_jax.nn.params import cache_spec, functional, parameters
from infinitevl_jax.nn.token_info import TokenInfo
from infinitevl_jax.serve import programs
from infinitevl_jax.serve.slots import Slots
from pallas_kernels.l2norm import products
from pallas_kernels.short_conv.tpu import short_conv as short_conv_tpu
from pallas_kernels.testing.tpu_programs import gdn_implementation


def gdn_layer(
    implementation: str, gradient: bool, length: int = 8192, heads: int = 16, width: int = 2048
) -> tuple[Callable, tuple]:
    """A whole Gated DeltaNet layer in bfloat16 for one packed sequence, with projections,
    convolutions and norms; K 128, V 256.

    implementation: as for `gdn_op`. gradient: also gradients in its parameters and its input.
    """
    config = TextConfig(
        hidden_size=width,
        num_linear_heads=heads,
        linear_head_dim=128,
        expand_v=2.0,
        layer_types=("linear_attention",),
    )
    ops = Ops(gated_delta_rule=gdn_implementation(implementation), l2norm=products.l2norm)
    if implementation == "mosaic_tpu":
        ops = dataclasses.replace(ops, short_conv=short_conv_tpu.short_conv)
    graphdef, params = nnx.split(GatedDeltaNet(config, ops))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), params)
    x, token = (
        jax.ShapeDtypeStruct((1, length, width), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, length), jnp.int32),
    )

    def forward(params, x, index, segment):
        return nnx.merge(graphdef, params)(
            x, None, TokenInfo(index, segment, index[:, 0], None, None)
        )[0]

    def both(params, x, index, segment, ct):
        y, pull = jax.vjp(lambda *inputs: forward(*inputs, index, segment), params, x)
        return y, pull(ct)

    return (
        (both, (params, x, token, token, x)) if gradient else (forward, (params, x, token, token))
    )


def text_model(layers: int | None = None) -> ModelConfig:
    """The published model without its tower, or only its first layers."""
    config = infinitevl_4b()
    text = dataclasses.replace(config.text, layer_types=config.text.layer_types[:layers])
    return dataclasses.replace(config, text=text, vision=None)


def decode_step(rows: int, layers: int | None = None) -> tuple[Callable, tuple]:
    """A step of an engine in bfloat16 that decodes a token of each of `rows` sequences, by XLA. The
    cache is updated in place."""
    config = text_model(layers)
    separate = {
        name: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16)
        for name, p in parameters(config, scanned=False).items()
    }
    model = functional(config, scanned=False, dtype=jnp.bfloat16)
    return jax.jit(partial(programs.decode_step, model), donate_argnums=(1, 2)), (
        jax.eval_shape(partial(fuse, config), separate),
        cache_spec(config, rows, None, jnp.bfloat16),
        jax.eval_shape(lambda: Slots.idle(rows, config.text.vocab_size)),
    )
