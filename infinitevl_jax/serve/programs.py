"""What is compiled to run a model: a call of the decoder, a step of decoding, and the choice of a
token."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from infinitevl_jax.inputs.model_inputs import DecoderInputs, text_inputs
from infinitevl_jax.nn.cache import Cache
from infinitevl_jax.serve.sampling import Sampling, choose


def on_mesh(mesh: Mesh | None) -> AbstractContextManager:
    """Within, programs are for this mesh (None: one device)."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


class Programs:
    """The compiled functions of one model: each compiles once for every shape that it meets.

    Attributes:
      encode(params, patches): vision tokens.
      forward, step: as the functions of that name below, `model` left out.
      choose(logits, key, sampling, occurred): [batch] tokens.
      mark(occurred, tokens): `occurred` [batch, vocab] with these tokens in it.
    """

    def __init__(self, model: Callable):
        """model(params) is a VLM that has these parameters."""
        self.encode = jax.jit(lambda params, patches: model(params).encode(patches))
        prefill = jax.named_scope("prefill")(partial(forward, model))
        self.forward = jax.jit(prefill, static_argnames="collect")
        self.step = jax.jit(
            partial(step, model), static_argnames="sampling", donate_argnames="cache"
        )
        self.choose = jax.jit(choose, static_argnames="sampling")
        self.mark = jax.jit(_mark, donate_argnums=0)


def forward(
    model,
    params: Mapping[str, Array],
    inputs: DecoderInputs,
    embeds,
    cache,
    keep=None,
    collect: bool = False,
):
    """One decoder call.

    Args:
      keep: [batch, n] int32, the places in each row whose logits are wanted; None wants all.
      collect: whether to return hidden states.

    Returns:
      Logits [batch, length or n, vocab] f32, the new cache, hidden states.
    """
    vlm = model(params)
    hidden, cache, states = vlm.decode(vlm.embed(inputs, embeds), inputs, cache, collect)
    if keep is not None:
        hidden = jnp.take_along_axis(hidden, keep[..., None], 1)
    return vlm.logits(hidden).astype(jnp.float32), cache, states


@jax.named_scope("decode")
def step(
    model,
    params,
    token: Array,
    cache: Cache,
    key: Array,
    sampling: Sampling,
    ends=None,
    occurred=None,
) -> tuple[Array, Cache]:
    """Append one token to every sequence and choose the next. A sequence whose token is one of
    `ends` stays as it is."""
    inputs = text_inputs(token[:, None])
    ended = jnp.zeros(token.shape, bool) if ends is None else jnp.isin(token, ends)
    if ends is not None:
        inputs = inputs._replace(token_index=jnp.where(ended[:, None], -1, inputs.token_index))
    logits, cache, _ = forward(model, params, inputs, None, cache)
    return jnp.where(ended, token, choose(logits[:, 0], key, sampling, occurred)), cache


def _mark(occurred: Array, tokens: Array) -> Array:
    return occurred.at[jnp.arange(len(tokens)), tokens].set(True)
