"""Models over a training batch in either of its forms: the whole decoder, or layer by layer."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from infinitevl_jax.data.batch import TrainBatch
from infinitevl_jax.inputs.model_inputs import DecoderInputs
from infinitevl_jax.nn.cache import Cache, empty
from infinitevl_jax.nn.stack import run_stacks
from infinitevl_jax.nn.vlm import VLM


@jax.named_scope("forward")
def hidden_states(model: Callable[[], VLM], batch: TrainBatch) -> tuple[VLM, Array]:
    """The model, and its hidden states [rows, length, width] of the branches.

    Args:
      model: casts the parameters at each call, so that gradients of two passes add in float32.
    """
    vlm = model()
    vision = None if batch.patches is None else vlm.encode(batch.patches)
    if batch.prefix is None:
        hidden, _, _ = vlm.decode(vlm.embed(batch.branches, vision), batch.branches)
    else:
        cache = empty(vlm.cache_spec(*_cache_size(batch.prefix, batch.branches)))
        x = vlm.embed(batch.prefix, vision)
        _, cache, _ = vlm.decode(x, batch.prefix, cache, fresh=True)
        vlm = model()
        hidden, _, _ = vlm.decode(
            vlm.embed(batch.branches, None), batch.branches, cache.select(batch.parents)
        )
    return vlm, hidden


@jax.named_scope("forward")
def run_layers(
    models: Sequence[Callable[[], VLM]], batch: TrainBatch, method: Callable
) -> list[Any]:
    """Run the layers of several models of the same layout side by side.

    The first model's embedding is the input of the first layers.

    Args:
      method: `method(*layers, x, states, infos) -> (x, states, sums)` for the layers of one depth,
        their states (None in packed rows) and token metadata, one of each model. `sums` is a pytree
        that adds up over tokens.

    Returns:
      The sums of each layer over the batch.
    """
    vlms = [model() for model in models]
    vision = None if batch.patches is None else vlms[0].encode(batch.patches)
    if batch.prefix is None:
        return _part(vlms, batch.branches, vision, None, method)[0]
    size = _cache_size(batch.prefix, batch.branches)
    specs = [vlm.cache_spec(*size) for vlm in vlms]
    layers = tuple(zip(*(spec.layers for spec in specs), strict=True))
    cache = empty(specs[0]._replace(layers=layers))
    before, cache = _part(vlms, batch.prefix, vision, cache, method, fresh=True)
    vlms = [model() for model in models]
    after, _ = _part(vlms, batch.branches, None, cache.select(batch.parents), method)
    return jax.tree.map(jnp.add, before, after)


def _part(
    vlms: Sequence[VLM],
    inputs: DecoderInputs,
    vision: Array | None,
    cache: Cache | None,
    method: Callable,
    fresh: bool = False,
) -> tuple[list[Any], Any]:
    """Sums of each layer over these tokens, and the cache after them.

    fresh: whether the cache is known to be empty.
    """
    positions = vlms[0].positions(inputs, cache)
    infos = [vlm.token_info(inputs, positions, cache)._replace(fresh=fresh) for vlm in vlms]
    nothing = (None,) * len(vlms)

    def step(*args):
        *layers, x, states, infos = args
        x, states, sums = method(*layers, x, states or nothing, infos)
        return x, (states if cache is not None else None, sums)

    given = [None] * vlms[0].layers.layout.depth if cache is None else cache.layers
    x = vlms[0].embed(inputs, vision)
    _, after, _ = run_stacks([vlm.layers for vlm in vlms], x, infos, given, method=step)
    states, sums = zip(*after, strict=True)
    return list(sums), cache and cache.after(states, inputs.token_index, positions)


def _cache_size(prefix: DecoderInputs, branches: DecoderInputs) -> tuple[int, int]:
    """Sequences of the prefix, and the largest number of tokens of a sequence."""
    count, longest = prefix.tokens.shape
    return count, longest + branches.tokens.shape[1]
