"""Statistics of an attention model over a stage's data, for initialisation.

Sums are kept on the devices, one set for each layer; the memory does not depend on the number of
tokens.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from infinitevl_jax.config.run import RunConfig
from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.nn.mixers.gated_delta_net import GatedDeltaNet
from infinitevl_jax.nn.mixers.softmax_attention import SoftmaxAttention
from infinitevl_jax.nn.token_info import TokenInfo
from infinitevl_jax.train.forward import run_layers
from infinitevl_jax.train.initialise.initialiser import Setting
from infinitevl_jax.train.step import model_of, put_batch
from pallas_kernels.attention import Mask

logger = logging.getLogger(__name__)

RUN = RunConfig(dtype="float32")


class Inputs(NamedTuple):
    """Sums over the real tokens that a mixer reads, float32.

    Attributes:
      gram: [width, width] of x x^T, for the normed input x.
      total: [width] of x.
      distance: [heads] tokens looked back, weighted with the attention, without token 0.
      mass: [heads] attention to tokens other than token 0.
    """

    gram: Array
    total: Array
    distance: Array
    mass: Array


class Products(NamedTuple):
    """Sums over the real tokens, float32, for the output projection of a new mixer.

    Attributes:
      gram: [features, features] of z z^T, for what the projection takes.
      cross: [features, width] of z y^T, for the attention's output y.
    """

    gram: Array
    cross: Array


def measure_inputs(
    setting: Setting, batches: Iterator[TrainBatch], tokens: int, layers: Sequence[int]
) -> list[Inputs]:
    """`Inputs` of these layers of the attention model over about `tokens` tokens."""

    def observe(layer, x, states, infos):
        (state,), (info,) = states, infos
        mixed, state = layer.mix(x, state, info)
        normed = layer.input_layernorm(x)
        seen = jnp.where((info.token_index >= 0)[..., None], normed, 0)
        sums = Inputs(
            jnp.einsum("btd,bte->de", seen, seen, precision="highest"),
            seen.sum((0, 1)),
            *look_back(layer.self_attn, normed, info),
        )
        return layer.add(x, mixed), (state,), sums

    model = model_of(setting.source, RUN, stacked=setting.stacked)

    def measure(params, batch):
        (source,) = params
        found = run_layers([lambda: model(source)], batch, observe)
        return [found[layer] for layer in layers]

    return _accumulate(setting, measure, (setting.source_params,), batches, tokens)


def measure_products(
    setting: Setting,
    params: dict[str, Array],
    batches: Iterator[TrainBatch],
    tokens: int,
    layers: Sequence[int],
) -> list[Products]:
    """`Products` of these Gated DeltaNet layers of the student with the parameters `params`."""

    def observe(source, student, x, states, infos):
        mixed, state = source.mix(x, states[0], infos[0])
        mixer, after, sums = student.self_attn, states[1], None
        if isinstance(mixer, GatedDeltaNet):
            z, after = mixer.before_output(student.input_layernorm(x), after, infos[1])
            z = jnp.where((infos[0].token_index >= 0)[..., None], z, 0)
            sums = Products(
                jnp.einsum("bte,btf->ef", z, z, precision="highest"),
                jnp.einsum("bte,btd->ed", z, mixed, precision="highest"),
            )
        return source.add(x, mixed), (state, after), sums

    models = [
        model_of(config, RUN, stacked=setting.stacked)
        for config in (setting.source, setting.student)
    ]

    def measure(params, batch):
        bound = [lambda model=model, p=p: model(p) for model, p in zip(models, params, strict=True)]
        found = run_layers(bound, batch, observe)
        return [found[layer] for layer in layers]

    return _accumulate(setting, measure, (setting.source_params, params), batches, tokens)


def look_back(attention: SoftmaxAttention, x: Array, info: TokenInfo) -> tuple[Array, Array]:
    """`Inputs.distance` and `Inputs.mass` of an attention layer.

    The attention itself averages the keys' places, so no probabilities are kept. Tokens after a
    cache are left out.

    Args:
      x: [batch, length, width] normed input.
    """
    q, k, v, _ = attention.project(x, info)
    index = info.token_index
    counts = ((index > 0) & (info.length == 0)[:, None]).astype(jnp.float32)
    places = jnp.stack([index * counts, counts], -1)  # [batch, length, 2]
    places = jnp.pad(places, [(0, 0), (0, 0), (0, v.shape[-1] - 2)])[:, :, None]
    out, _ = attention.ops.attention(
        q,
        k,
        jnp.broadcast_to(places, v.shape).astype(v.dtype),
        index,
        index,
        info.segment_ids,
        info.segment_ids,
        mask=Mask(window=attention.window, sinks=attention.sinks, aligned=True),
        scale=attention.head_dim**-0.5,
    )
    mass = jnp.where(counts[..., None] > 0, out[..., 1], 0)
    distance = jnp.where(counts[..., None] > 0, index[..., None] * mass - out[..., 0], 0)
    return distance.sum((0, 1)), mass.sum((0, 1))


def _accumulate(
    setting: Setting, measure: Any, params: tuple, batches: Iterator[TrainBatch], tokens: int
) -> list[Any]:
    """Sums of measure(params, batch) over batches with at least `tokens` tokens."""

    def add(sums, params, batch):
        return jax.tree.map(jnp.add, sums, measure(params, batch))

    everywhere = NamedSharding(setting.mesh, PartitionSpec())
    step, sums, seen = jax.jit(add, donate_argnums=0, out_shardings=everywhere), None, 0
    while seen < tokens:
        placed = put_batch(next(batches), setting.mesh)
        parts = [part for part in (placed.prefix, placed.branches) if part is not None]
        seen += sum(int(jnp.sum(part.token_index >= 0)) for part in parts)
        if sums is None:
            shapes = jax.eval_shape(measure, params, placed)
            sums = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
        sums = step(sums, params, placed)
        jax.block_until_ready(sums)  # one batch at a time
    return sums or []
